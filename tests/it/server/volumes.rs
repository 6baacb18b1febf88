//! Volumes as wholes: made, listed, changed, assigned, removed, and refused with words.

use dst::errno::Errno;
use dst::roles::server::{Config, Server};
use dst::units::Id;
use dst::wire::frame::Op;
use dst::wire::volume::{Assign, Create, List, Member, Named, Page, Resize, Volume};

use super::client::{Dir, array, ask, assign, attach, config, create, named, refusal, start, stat, try_attach};

fn resize(name: &str, size: u64, force: bool) -> Resize {
    Resize { name: name.to_owned(), size, force }
}

#[test]
fn a_volume_lives_and_goes() {
    let dir = Dir::new();
    let (_server, address) = start(dir.path());
    let made = create(address, "v", 1 << 20, false);
    assert_eq!((made.size, made.sparse, made.array.clone(), made.connections), (1 << 20, false, None, 0));
    assert!(made.allocated >= 1 << 20);
    assert_eq!(stat(address, "v"), made);
    assert_eq!(create(address, "s", 1 << 30, true).allocated, 0);
    let again = Create { name: "v".to_owned(), size: 4096, sparse: false, write_through: false };
    let (errno, text) = refusal(ask::<_, Volume>(address, Op::VolumeCreate, &again));
    assert_eq!(errno, Errno::EEXIST);
    assert!(text.contains("'v'"), "{text}");
    let grown: Volume = ask(address, Op::VolumeResize, &resize("v", 2 << 20, false)).unwrap();
    assert_eq!(grown.size, 2 << 20);
    assert!(grown.allocated >= 2 << 20);
    let (errno, _) = refusal(ask::<_, Volume>(address, Op::VolumeResize, &resize("v", 4096, false)));
    assert_eq!(errno, Errno::EPERM);
    assert_eq!(ask::<_, Volume>(address, Op::VolumeResize, &resize("v", 4096, true)).unwrap().size, 4096);
    ask::<_, Volume>(address, Op::VolumeRemove, &named("v", false)).unwrap();
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeStat, &named("v", false))).0, Errno::ENOENT);
    let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, [".lock", ".s.state", "s", "s.dst"]);
}

#[test]
fn a_long_list_comes_in_pages() {
    let dir = Dir::new();
    let (_server, address) = start(dir.path());
    let names: Vec<String> = (0..120).map(|at| format!("v{at:03}")).collect();
    names.iter().for_each(|name| drop(create(address, name, 4096, true)));
    let mut seen = Vec::new();
    loop {
        let question = List { after: seen.last().cloned() };
        let page: Page = ask(address, Op::VolumeList, &question).unwrap();
        seen.extend(page.volumes.into_iter().map(|volume| volume.name));
        if !page.more {
            break;
        }
    }
    assert_eq!(seen, names);
}

#[test]
fn one_array_has_a_volume_until_it_is_freed() {
    let dir = Dir::new();
    let (_server, address) = start(dir.path());
    create(address, "v", 1 << 20, false);
    let (errno, text) = try_attach(address, "v", (1, 1, 0)).err().unwrap();
    assert_eq!(errno, Errno::EPERM);
    assert!(text.contains("assigned"), "{text}");
    assert_eq!(assign(address, "v").array, Some(array()));
    assign(address, "v");
    let other = Member { id: Id([0xb; 16]), name: "other".to_owned(), node: "n-0".to_owned() };
    let theirs = Assign { name: "v".to_owned(), array: other.clone() };
    let (errno, text) = refusal(ask::<_, Volume>(address, Op::VolumeAssign, &theirs));
    assert_eq!(errno, Errno::EBUSY);
    assert!(text.contains("storage"), "{text}");
    let client = attach(address, "v", (1, 1, 0));
    assert_eq!(stat(address, "v").connections, 1);
    for op in [Op::VolumeRemove, Op::VolumeFree] {
        let (errno, text) = refusal(ask::<_, Volume>(address, op, &named("v", true)));
        assert_eq!(errno, Errno::EBUSY);
        assert!(text.contains("attached"), "{text}");
    }
    let grown: Volume = ask(address, Op::VolumeResize, &resize("v", 2 << 20, false)).unwrap();
    assert_eq!(grown.size, 2 << 20, "a volume grows under its array");
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeResize, &resize("v", 4096, true))).0, Errno::EBUSY);
    drop(client);
    while stat(address, "v").connections > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeRemove, &named("v", false))).0, Errno::EBUSY);
    let wrong = Named { array: Some(other.id), ..named("v", false) };
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeFree, &wrong)).0, Errno::EBUSY);
    let ours = Named { array: Some(array().id), ..named("v", false) };
    assert_eq!(ask::<_, Volume>(address, Op::VolumeFree, &ours).unwrap().array, None);
    assert_eq!(ask::<_, Volume>(address, Op::VolumeAssign, &theirs).unwrap().array, Some(other));
    let (errno, _) = try_attach(address, "v", (1, 1, 0)).err().unwrap();
    assert_eq!(errno, Errno::EBUSY);
    // Whoever was refused is a connection for a moment.
    while stat(address, "v").connections > 0 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    ask::<_, Volume>(address, Op::VolumeRemove, &named("v", true)).unwrap();
    assert_eq!(try_attach(address, "v", (1, 1, 0)).err().unwrap().0, Errno::ENOENT);
}

#[test]
fn bad_names_and_sizes_are_refused() {
    let dir = Dir::new();
    let (_server, address) = start(dir.path());
    for (name, size) in
        [("", 4096), ("../x", 4096), (".x", 4096), ("x.dst", 4096), ("x", 0), ("x", 4095), ("x", u64::MAX)]
    {
        let question = Create { name: name.to_owned(), size, sparse: true, write_through: false };
        assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeCreate, &question)).0, Errno::EINVAL, "{name} {size}");
    }
    assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeStat, &named("../x", false))).0, Errno::EINVAL);
    // More than any disk has: nothing is left behind.
    let huge = Create { name: "x".to_owned(), size: 1 << 50, sparse: false, write_through: false };
    let (errno, text) = refusal(ask::<_, Volume>(address, Op::VolumeCreate, &huge));
    assert!(matches!(errno, Errno::ENOSPC), "{errno:?}");
    assert!(text.contains("'x'"), "{text}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the lock");
    let page: Page = ask(address, Op::VolumeList, &List::default()).unwrap();
    assert_eq!(page, Page::default());
}

#[test]
fn damaged_and_foreign_files_are_named_and_not_touched() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    for name in ["good", "torn", "short", "newer"] {
        create(address, name, 1 << 20, true);
    }
    server.stop();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("torn.dst"), b"dst volume 1 00000000\n{}").unwrap();
    let newer = std::fs::read_to_string(at("newer.dst")).unwrap().replacen("volume 1", "volume 9", 1);
    std::fs::write(at("newer.dst"), &newer).unwrap();
    std::fs::write(at("short"), b"").unwrap();
    std::fs::write(at("orphan"), b"precious").unwrap();
    std::fs::write(at(".half.new"), b"x").unwrap();
    std::fs::write(at(".half.dst.new"), b"x").unwrap();
    std::fs::write(at("keep.txt~"), b"x").unwrap();
    let (_server, address) = start(dir.path());
    let page: Page = ask(address, Op::VolumeList, &List::default()).unwrap();
    let problems: Vec<_> = page.volumes.iter().map(|volume| (volume.name.as_str(), volume.problem.is_some())).collect();
    assert_eq!(problems, [("good", false), ("newer", true), ("orphan", true), ("short", true), ("torn", true)]);
    assert!(page.volumes[1].problem.as_ref().unwrap().contains("version 9"));
    for name in ["torn", "short", "newer", "orphan"] {
        let (errno, text) = try_attach(address, name, (1, 1, 0)).err().unwrap();
        assert_eq!(errno, Errno::EIO);
        assert!(text.contains(name) && text.contains("damaged"), "{text}");
        assert_eq!(refusal(ask::<_, Volume>(address, Op::VolumeRemove, &named(name, false))).0, Errno::EIO);
    }
    assert!(!at(".half.new").exists() && !at(".half.dst.new").exists());
    assert!(at("keep.txt~").exists());
    assert_eq!(std::fs::read(at("orphan")).unwrap(), b"precious");
    assert_eq!(std::fs::read_to_string(at("newer.dst")).unwrap(), newer);
    ask::<_, Volume>(address, Op::VolumeRemove, &named("torn", true)).unwrap();
    assert!(!at("torn").exists() && !at("torn.dst").exists());
}

#[test]
fn a_crash_while_making_or_removing_is_finished_at_the_next_start() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    for name in ["made", "gone", "both"] {
        create(address, name, 1 << 20, true);
    }
    server.stop();
    let at = |name: &str| dir.path().join(name);
    std::fs::rename(at("made"), at(".made.new")).unwrap();
    std::fs::rename(at("gone"), at(".gone.gone")).unwrap();
    let (_server, address) = start(dir.path());
    let page: Page = ask(address, Op::VolumeList, &List::default()).unwrap();
    let names: Vec<_> = page.volumes.iter().map(|volume| (volume.name.as_str(), volume.problem.as_ref())).collect();
    assert_eq!(names, [("both", None), ("made", None)]);
    assert!(!at("gone.dst").exists() && !at(".gone.gone").exists());
}

#[test]
fn starting_refuses_what_is_not_safe() {
    let dir = Dir::new();
    let (server, address) = start(dir.path());
    let error = Server::start(config(dir.path())).unwrap_err();
    assert_eq!(error.errno, Errno::EBUSY);
    assert!(error.text.contains("in use by another dstd server"), "{error}");
    let other = Dir::new();
    let error = Server::start(Config { listen: vec![address], ..config(other.path()) }).unwrap_err();
    assert_eq!(error.errno, Errno::EADDRINUSE);
    let open = Config { listen: vec!["0.0.0.0:0".parse().unwrap()], ..config(other.path()) };
    let error = Server::start(open.clone()).unwrap_err();
    assert_eq!(error.errno, Errno::EPERM);
    assert!(error.text.contains("--danger-cleartext"), "{error}");
    drop(server);
    Server::start(config(dir.path())).unwrap().stop();
    let error = Server::start(Config { pool: dir.path().join(".lock"), ..config(other.path()) }).unwrap_err();
    assert!(error.text.contains("pool"), "{error}");
}
