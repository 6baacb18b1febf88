//! What the documents promise about the source is true of it: floors, contracts at the head of files, one home for `unsafe`,
//! sizes. Imports are parsed, so grouped ones and `super` are seen.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use syn::visit::Visit;

/// Code lines (without tests, blanks and comments) that a file may have before it should be split by noun.
const FILE_LINES_MAX: usize = 520;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(under: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(under)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "{under} has no source");
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

/// Floor of a module path below `crate::`, by its first name.
fn floor(module: &str) -> u8 {
    match module {
        "units" | "errno" | "limits" | "bugs" => 0,
        "geometry" | "engine" | "store" | "wire" | "control" => 1,
        "io" => 2,
        "roles" => 3,
        other => panic!("'{other}' has no floor: give it one in tests/it/tidy.rs and in docs/ARCHITECTURE.md"),
    }
}

/// Every path that a file names, as text: `crate::a::b`, `std::fs::File`.
#[derive(Default)]
struct Paths {
    found: BTreeSet<String>,
    unsafe_code: bool,
}

impl Paths {
    fn tree(&mut self, tree: &syn::UseTree, prefix: &str) {
        let join = |name: &syn::Ident| if prefix.is_empty() { name.to_string() } else { format!("{prefix}::{name}") };
        match tree {
            syn::UseTree::Path(path) => self.tree(&path.tree, &join(&path.ident)),
            syn::UseTree::Name(name) => drop(self.found.insert(join(&name.ident))),
            syn::UseTree::Rename(rename) => drop(self.found.insert(join(&rename.ident))),
            syn::UseTree::Glob(_) => drop(self.found.insert(format!("{prefix}::*"))),
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.tree(item, prefix)),
        }
    }
}

fn is_test_only(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let syn::Meta::List(list) = &attribute.meta else { return false };
        list.path.is_ident("cfg") && list.tokens.to_string() == "test"
    })
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_test_only(&module.attrs) {
            syn::visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.tree(&item.tree, "");
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|segment| segment.ident.to_string()).collect();
        self.found.insert(names.join("::"));
        syn::visit::visit_path(self, path);
    }

    fn visit_expr_unsafe(&mut self, block: &'ast syn::ExprUnsafe) {
        self.unsafe_code = true;
        syn::visit::visit_expr_unsafe(self, block);
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        self.unsafe_code |= item.unsafety.is_some();
        syn::visit::visit_item_impl(self, item);
    }

    fn visit_signature(&mut self, signature: &'ast syn::Signature) {
        self.unsafe_code |= signature.unsafety.is_some();
        syn::visit::visit_signature(self, signature);
    }
}

fn paths(file: &Path) -> Paths {
    let text = std::fs::read_to_string(file).unwrap();
    let mut paths = Paths::default();
    paths.visit_file(&syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", shown(file))));
    paths
}

/// The module path of a source file: `src/io/ring.rs` is `["io", "ring"]`.
fn module_of(file: &Path) -> Vec<String> {
    let relative = file.strip_prefix(root().join("src")).unwrap().with_extension("");
    let mut names: Vec<String> = relative.iter().map(|name| name.to_str().unwrap().to_owned()).collect();
    if names.last().is_some_and(|last| last == "mod") {
        names.pop();
    }
    names
}

#[test]
fn imports_go_down() {
    let mut wrong = Vec::new();
    for file in rust_files("src") {
        let module = module_of(&file);
        if matches!(module[0].as_str(), "lib" | "main") {
            continue;
        }
        let own = floor(&module[0]);
        for path in &paths(&file).found {
            let names: Vec<&str> = path.split("::").collect();
            if names[0] == "super" && names.get(1) == Some(&"super") {
                wrong.push(format!("{}: {path} climbs twice", shown(&file)));
            }
            if names[0] != "crate" || names.len() < 2 {
                continue;
            }
            let theirs = floor(names[1]);
            let sibling = names[1] == module[0];
            if theirs > own || (theirs == own && own == 3 && !sibling && names[1] != "roles") {
                wrong.push(format!("{}: floor {own} imports {path} of floor {theirs}", shown(&file)));
            }
            // Floor 2: siblings know ring and buffer, and their own folder, and nothing else of each other.
            if own == 2 && sibling && names.len() > 2 {
                let own_folder = module.get(1).is_some_and(|noun| noun == names[2]);
                if !own_folder && !matches!(names[2], "ring" | "buffer") {
                    wrong.push(format!("{}: {path} is a sibling's", shown(&file)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn rules_never_touch_the_world() {
    const WORLD: [&str; 14] = [
        "std::net",
        "std::fs",
        "std::thread",
        "std::process",
        "std::env",
        "std::os",
        "std::time::Instant",
        "std::time::SystemTime",
        "std::collections::HashMap",
        "std::collections::HashSet",
        "tokio",
        "nix",
        "libc",
        "getrandom",
    ];
    let mut wrong = Vec::new();
    for file in rust_files("src") {
        let module = module_of(&file);
        if matches!(module[0].as_str(), "lib" | "main") || floor(&module[0]) > 1 {
            continue;
        }
        for path in &paths(&file).found {
            // Addresses are words; sockets are not.
            let words = path.starts_with("std::net::") && (path.ends_with("Addr") || path.contains("Addr::"));
            let banned = WORLD.iter().any(|world| path == world || path.starts_with(&format!("{world}::")));
            if banned && !words {
                wrong.push(format!("{}: {path}", shown(&file)));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

#[test]
fn unsafe_lives_in_io() {
    for file in rust_files("src").into_iter().chain(rust_files("dst-cli/src")) {
        let home = shown(&file).starts_with("src/io/");
        assert!(home || !paths(&file).unsafe_code, "{} has unsafe code", shown(&file));
    }
}

#[test]
fn every_file_opens_with_its_contract() {
    for folder in ["src", "dst-cli/src", "tests"] {
        for file in rust_files(folder) {
            let text = std::fs::read_to_string(&file).unwrap();
            assert!(text.starts_with("//!"), "{} does not open with //!", shown(&file));
        }
    }
}

#[test]
fn files_stay_small() {
    let mut large = Vec::new();
    for file in rust_files("src").into_iter().chain(rust_files("dst-cli/src")) {
        let text = std::fs::read_to_string(&file).unwrap();
        let code = text.split("#[cfg(test)]\nmod ").next().unwrap_or("");
        let lines = code.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("//")).count();
        if lines > FILE_LINES_MAX {
            large.push(format!("{} has {lines} lines of code", shown(&file)));
        }
    }
    assert!(large.is_empty(), "\n{}\nSplit by noun, or raise the bound with a reason.", large.join("\n"));
}

#[test]
fn nothing_is_left_unfinished() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("unimpl", "emented!"), concat!("to", "do!")];
    for folder in ["src", "dst-cli/src", "tests"] {
        for file in rust_files(folder) {
            let text = std::fs::read_to_string(&file).unwrap();
            for word in words {
                assert!(!text.contains(word), "{} says {word}", shown(&file));
            }
        }
    }
}

#[test]
fn the_command_line_links_only_the_pure_floors() {
    let output = std::process::Command::new(env!("CARGO"))
        .args(["tree", "-p", "dst-cli", "--edges", "normal", "--prefix", "none", "--offline"])
        .current_dir(root())
        .output()
        .unwrap();
    let tree = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for banned in ["libublk", "io-uring", "tokio-uring", "nix", "sysfs-class"] {
        let linked = tree.lines().any(|line| line.split(' ').next() == Some(banned));
        assert!(!linked, "dst-cli links {banned}:\n{tree}");
    }
}

/// Whether some file under `folder`, with the last module of `path` in its name, has a function of that name.
fn has_function(folder: &str, path: &str) -> bool {
    let (module, name) = path.rsplit_once("::").unwrap_or(("", path));
    let module = module.rsplit("::").next().unwrap_or("");
    rust_files(folder).iter().any(|file| {
        file.file_stem().is_some_and(|stem| stem == module)
            && std::fs::read_to_string(file).unwrap().contains(&format!("fn {name}("))
    })
}

#[test]
fn what_the_reliability_page_names_exists() {
    let text = std::fs::read_to_string(root().join("docs/RELIABILITY.md")).unwrap();
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let bugs = read("src/bugs.rs");
    let checks = ["guest", "recover", "ublk"].map(|test| read(&format!("tests/vm/{test}-test.sh"))).concat();
    let parts: Vec<&str> = text.split('`').collect();
    assert!(parts.len() % 2 == 1, "a backtick is missing");
    let mut named = 0;
    for pair in parts.chunks_exact(2) {
        let (before, code) = (pair[0], pair[1]);
        let exists = match code.split_once(' ') {
            _ if before.ends_with("bug ") => bugs.contains(&format!("\n    {code} \"")),
            // What stands for a name in the explanation.
            Some((_, "X")) => continue,
            Some(("it", path)) => has_function("tests/it", path),
            Some(("unit", path)) => has_function("src", path),
            Some(("vm", what)) => checks.contains(&format!("check \"{what}\"")),
            _ => continue,
        };
        assert!(exists, "docs/RELIABILITY.md names {code}, which there is not");
        named += 1;
    }
    assert!(named > 80, "only {named} names");
}
