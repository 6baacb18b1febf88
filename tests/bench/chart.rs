//! Bars for the medians: one picture for each report, a row of groups for each table.

use std::fmt::Write as _;

use crate::report::Report;

const COLOURS: [&str; 8] = ["#1f77b4", "#17becf", "#ff7f0e", "#ffbb78", "#2ca02c", "#bbbbbb", "#9467bd", "#8c564b"];
const BAR: usize = 14;
const GAP: usize = 24;
const HEIGHT: usize = 160;
const LEFT: usize = 20;

/// The picture.
pub(crate) fn draw(report: &Report) -> String {
    let mut body = String::new();
    let (mut top, mut widest) = (10, 0);
    for table in report.tables() {
        let (works, whos) = (report.works(&table), report.whos(&table));
        let _ = writeln!(body, r#"<text x="{LEFT}" y="{}" font-weight="bold">{}</text>"#, top + 14, escaped(&table));
        let mut x = LEFT;
        for (number, who) in whos.iter().enumerate() {
            let colour = COLOURS[number % COLOURS.len()];
            let _ = writeln!(body, r#"<rect x="{x}" y="{}" width="10" height="10" fill="{colour}"/>"#, top + 24);
            let _ = writeln!(body, r#"<text x="{}" y="{}">{}</text>"#, x + 14, top + 33, escaped(who));
            x += 30 + who.chars().count() * 7;
            widest = widest.max(x);
        }
        let base = top + 60 + HEIGHT;
        let group = whos.len() * BAR + GAP;
        // Wide enough for its name.
        let group = works.iter().map(|work| work.chars().count() * 7 + 8).max().unwrap_or(0).max(group);
        for (place, work) in works.iter().enumerate() {
            let x = LEFT + place * group;
            let medians: Vec<f64> =
                whos.iter().map(|who| report.median(&table, work, who, |sample| sample.rate)).collect();
            let most = medians.iter().copied().filter(|rate| rate.is_finite()).fold(1.0, f64::max);
            for (number, rate) in medians.iter().enumerate().filter(|(_, rate)| rate.is_finite()) {
                let height = (rate / most * HEIGHT as f64).round();
                let colour = COLOURS[number % COLOURS.len()];
                let (left, y) = (x + number * BAR, base as f64 - height);
                let title = format!("{}, {work}: {rate:.0} a second", whos[number]);
                let _ = writeln!(
                    body,
                    r#"<rect x="{left}" y="{y}" width="{}" height="{height}" fill="{colour}"><title>{}</title></rect>"#,
                    BAR - 2,
                    escaped(&title)
                );
            }
            let _ = writeln!(body, r#"<text x="{x}" y="{}">{}</text>"#, base + 14, escaped(work));
            let _ = writeln!(body, r##"<text x="{x}" y="{}" fill="#777">{}</text>"##, base + 28, short(most));
            widest = widest.max(x + group);
        }
        top = base + 44;
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{widest}\" height=\"{top}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n{body}</svg>\n"
    )
}

/// The highest bar of a group.
fn short(rate: f64) -> String {
    if rate >= 10_000.0 { format!("top: {:.0}k/s", rate / 1e3) } else { format!("top: {rate:.0}/s") }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}
