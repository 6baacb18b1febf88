//! The control tree against real daemons: over the socket, and as files.

use crate::farm::Farm;

/// The array of the 2007 diary: two nodes of 800 sectors, end to end.
fn storage(farm: &Farm) {
    let (a, b) = (farm.volume(0, "a", "400K"), farm.volume(1, "b", "400K"));
    farm.dst(&format!("create storage --alg linear {a} {b}"));
}

#[test]
fn the_tree_of_2007_over_the_socket() {
    let farm = Farm::new(2);
    assert_eq!(farm.dst("tree"), "");
    storage(&farm);
    farm.start_nbd("storage", "--queues 2 --depth 64");
    for (path, value) in [
        ("alg", "alg_linear".to_owned()),
        ("name", "storage".to_owned()),
        ("nodes", "sectors (start [size]): 0 [800] | 800 [800]".to_owned()),
        ("n-0/type", format!("R: {}", farm.servers[0].address)),
        ("n-800/type", format!("R: {}", farm.servers[1].address)),
        ("n-800/size", "800".to_owned()),
        ("n-800/start", "800".to_owned()),
        ("state", "started".to_owned()),
        ("size", "1600".to_owned()),
        ("tags_free", "128".to_owned()),
    ] {
        assert_eq!(farm.dst(&format!("get devices/storage/{path}")), value, "{path}");
        assert!(farm.dst("tree").contains(&format!("devices/storage/{path} : {value}\n")), "{path}");
    }
    assert!(farm.dst("tree").contains("\ndevices/storage/remove_all_nodes\n"));
    assert!(farm.dst("tree devices/storage/n-800").starts_with("devices/storage/n-800/type : R: "));
    for (words, says) in [
        ("get devices/storage/remove_all_nodes", "cannot be read"),
        ("get devices/storage", "is a directory"),
        ("get devices/storage/n-8/type", "there is no 'n-8'"),
        ("get devices/none/alg", "there is no 'none'"),
        ("tree devices/none", "there is no 'none'"),
        ("set devices/storage/alg alg_mirror", "only shows what is"),
        ("set devices/storage/remove_all_nodes 1", "is started"),
        ("set devices/storage/remove_all_nodes 2", "is started"),
    ] {
        let error = farm.dst_fails(words);
        assert!(error.contains(says), "{words}: {error}");
    }
    farm.dst("stop storage");
    assert!(farm.dst_fails("set devices/storage/remove_all_nodes 2").contains("write 1"));
    assert_eq!(farm.dst("get devices/storage/device"), "");
    assert_eq!(farm.dst("set devices/storage/remove_all_nodes 1"), "");
    assert!(farm.dst("list").contains("no arrays"));
}
