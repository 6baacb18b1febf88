//! One function for each verb: asks, and hands the answer to be shown. An error is what a person reads.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::time::Duration;

use clap::CommandFactory;
use dst::control::command::{Answer, Arrays, Create, Force, Import, NewNode, NewReplica, Removed, Start, Terms};
use dst::control::device::{Device, DeviceState, Devices};
use dst::control::label::{Label, SLOT_BYTES, beside, slots};
use dst::control::spec::RunOptions;
use dst::control::status::ArrayStatus;
use dst::control::target::{ServerAddress, Target};
use dst::control::tree::{Entries, Value};
use dst::control::why::Why;
use dst::wire::frame::Op;
use dst::wire::volume;
use dst::wire::volume::{List, Named, Page, Resize, Volume};

use crate::args::{
    Arguments, CreateArguments, DeviceVerb, ReplicaVerb, StartArguments, Verb, VolumeTarget, VolumeVerb,
};
use crate::client::{Daemon, ask_server};
use crate::nodes;
use crate::render;
use crate::scrub;
use crate::upgrade;

/// How often `status --watch` looks.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// Does what was typed.
pub(crate) fn run(arguments: Arguments) -> Result<(), String> {
    let daemon = Daemon { socket: &arguments.socket };
    let json = arguments.json;
    match arguments.verb {
        Verb::Volume(verb) => run_volume(verb, json),
        Verb::Create(create) => run_create(&daemon, create, json),
        Verb::Start(start) => run_start(&daemon, start, json),
        Verb::Stop { array, force } => {
            let stopped: ArrayStatus = daemon.ask("POST", &format!("/v1/arrays/{array}/stop"), &Force { force })?;
            render::one(&stopped, json, |array| format!("stopped {}", array.name))
        }
        Verb::Remove { array, force } => {
            let query = if force { "?force=true" } else { "" };
            let removed: Removed = daemon.ask("DELETE", &format!("/v1/arrays/{array}{query}"), &())?;
            warn(&removed.warnings);
            render::one(&removed, json, |removed| format!("removed {}", removed.name))
        }
        Verb::Grow { array, target, size } => {
            let grown: ArrayStatus = match target {
                Some(target) => {
                    let new = NewNode { target: target.to_string(), size };
                    daemon.ask("POST", &format!("/v1/arrays/{array}/nodes"), &new)?
                }
                None => daemon.ask("POST", &format!("/v1/arrays/{array}/grow"), &())?,
            };
            warn(&grown.warnings);
            render::one(&grown, json, render::grown)
        }
        Verb::Import { target, name, force } => {
            let import = Import { target: target.to_string(), name, force };
            let imported: ArrayStatus = daemon.ask("POST", "/v1/import", &import)?;
            warn(&imported.warnings);
            render::one(&imported, json, |array| render::made("imported", array))
        }
        Verb::Replica(ReplicaVerb::Add { array, node, target }) => {
            let path = format!("/v1/arrays/{array}/nodes/{node}/replicas");
            let changed: ArrayStatus = daemon.ask("POST", &path, &NewReplica { target: target.to_string() })?;
            warn(&changed.warnings);
            render::one(&changed, json, |array| {
                format!("added {target} to {node} of {}: it is filled while the array is started", array.name)
            })
        }
        Verb::Replica(ReplicaVerb::Remove { array, node, replica }) => {
            let path = format!("/v1/arrays/{array}/nodes/{node}/replicas/{replica}");
            let changed: ArrayStatus = daemon.ask("DELETE", &path, &())?;
            warn(&changed.warnings);
            render::one(&changed, json, |array| format!("removed replica {replica} of {node} of {}", array.name))
        }
        Verb::Replica(ReplicaVerb::List { array }) => {
            let array: ArrayStatus = daemon.ask("GET", &format!("/v1/arrays/{array}"), &())?;
            render::one(&array.nodes, json, |_| render::replicas(&array))
        }
        Verb::Scrub(typed) => scrub::run(&daemon, &typed, json),
        Verb::Node(verb) => nodes::run(&daemon, verb, json),
        Verb::Device(verb) => run_device(&daemon, verb, json),
        Verb::Why { array } => {
            let why: Why = daemon.ask("GET", &format!("/v1/arrays/{array}/why"), &())?;
            render::one(&why, json, render::why)
        }
        Verb::Tree { path } => {
            let shown: Entries = daemon.ask("GET", &format!("/v1/tree/{path}"), &())?;
            render::one(&shown, json, Entries::text)
        }
        Verb::Get { path } => run_get(&daemon, &path, json),
        Verb::Set { path, value } => {
            let answer: Answer = daemon.ask("PUT", &format!("/v1/tree/{path}"), &Value { value })?;
            warn(answer.warnings());
            render::one(&answer, json, |_| String::new())
        }
        Verb::List => {
            let arrays: Arrays = daemon.ask("GET", "/v1/arrays", &())?;
            render::one(&arrays, json, |arrays| render::arrays(&arrays.arrays))
        }
        Verb::Status { array, watch } => run_status(&daemon, array.as_deref(), watch, json),
        Verb::Upgrade { force } => upgrade::run(&daemon, force, json),
        Verb::Generate(given) => given.run(Arguments::command(), "1"),
    }
}

/// What was done and may be regretted.
pub(crate) fn warn(warnings: &[String]) {
    for warning in warnings {
        eprintln!("dst: {warning}");
    }
}

fn run_get(daemon: &Daemon, path: &str, json: bool) -> Result<(), String> {
    let shown: Entries = daemon.ask("GET", &format!("/v1/tree/{path}"), &())?;
    match shown.tree.as_slice() {
        [entry] if entry.path == path => match &entry.value {
            Some(value) if !json => render::line(value),
            Some(_) => render::one(entry, json, |_| String::new()),
            None => Err(format!("{path} cannot be read: it is there to be written, with 'dst set'")),
        },
        _ => Err(format!("{path} is a directory: 'dst tree {path}' shows what is in it")),
    }
}

fn run_device(daemon: &Daemon, verb: DeviceVerb, json: bool) -> Result<(), String> {
    let found: Devices = daemon.ask("GET", "/v1/devices", &())?;
    match verb {
        DeviceVerb::List => render::one(&found.devices, json, |_| render::devices(&found.devices)),
        DeviceVerb::Delete { id, force } => {
            let query = if force { "?force=true" } else { "" };
            let gone: Device = daemon.ask("DELETE", &format!("/v1/devices/{id}{query}"), &())?;
            render::one(&gone, json, |gone| format!("deleted {}", gone.path))
        }
        DeviceVerb::Recover { id } => {
            let device = found.devices.into_iter().find(|device| device.id == id);
            let device = device
                .ok_or_else(|| format!("there is no device {id} of dst: 'dst device list' shows those there are"))?;
            let path = &device.path;
            let array = match (device.state, &device.array) {
                (DeviceState::Served, _) => return Err(format!("{path} is served already")),
                (DeviceState::Dead, _) => {
                    return Err(format!("{path} is gone: 'dst device delete {id}' frees its number"));
                }
                (DeviceState::Waiting, None) => {
                    return Err(format!("this dstd has no array for {path}: 'dst device delete {id}' removes it"));
                }
                (DeviceState::Waiting, Some(array)) => array,
            };
            let array: ArrayStatus = daemon.ask("GET", &format!("/v1/arrays/{array}"), &())?;
            let run = array.spec.map(|spec| spec.run).unwrap_or_default();
            let start = Start { run, terms: Terms::default() };
            let started: ArrayStatus = daemon.ask("POST", &format!("/v1/arrays/{}/start", array.name), &start)?;
            render::one(&started, json, |array| array.device.clone().unwrap_or_default())
        }
    }
}

fn run_create(daemon: &Daemon, typed: CreateArguments, json: bool) -> Result<(), String> {
    let CreateArguments { array: name, alg, chunk, block, replicas, targets } = typed;
    // A path is the daemon's to open, and its folder is another one.
    let made: ArrayStatus =
        daemon.ask("POST", "/v1/arrays", &Create { name, alg, chunk, block, replicas, targets, size: None })?;
    warn(&made.warnings);
    render::one(&made, json, |array| render::made("created", array))
}

fn run_start(daemon: &Daemon, typed: StartArguments, json: bool) -> Result<(), String> {
    let StartArguments { array, frontend, queues, depth, io_timeout, data_digest, danger_cleartext, take_over, force } =
        typed;
    let run = RunOptions { frontend, queues, depth, io_timeout, data_digest, danger_cleartext };
    let start = Start { run, terms: Terms { take_over, force } };
    let started: ArrayStatus = daemon.ask("POST", &format!("/v1/arrays/{array}/start"), &start)?;
    render::one(&started, json, |array| array.device.clone().unwrap_or_default())
}

fn run_status(daemon: &Daemon, array: Option<&str>, watch: bool, json: bool) -> Result<(), String> {
    loop {
        match array {
            Some(name) => {
                let array: ArrayStatus = daemon.ask("GET", &format!("/v1/arrays/{name}"), &())?;
                render::page(&array, watch, json, |array| render::status(std::slice::from_ref(array)))?;
            }
            None => {
                let arrays: Arrays = daemon.ask("GET", "/v1/arrays", &())?;
                render::page(&arrays, watch, json, |arrays| render::status(&arrays.arrays))?;
            }
        }
        if !watch {
            return Ok(());
        }
        std::thread::sleep(WATCH_INTERVAL);
    }
}

fn run_volume(verb: VolumeVerb, json: bool) -> Result<(), String> {
    match verb {
        VolumeVerb::Create { volume: VolumeTarget { server, volume: name }, size, sparse, write_through } => {
            let ask = volume::Create { name, size, sparse, write_through };
            let made: Volume = ask_server(&server, Op::VolumeCreate, &ask)?;
            render::one(&made, json, |made| render::volume_done("created", &server, made))
        }
        VolumeVerb::List { server } => {
            let volumes = list(&server)?;
            render::one(&volumes, json, |volumes| render::volumes(volumes))
        }
        VolumeVerb::Stat { volume: VolumeTarget { server, volume: name } } => {
            let found: Volume = ask_server(&server, Op::VolumeStat, &Named { name, array: None, force: false })?;
            render::one(&found, json, |found| render::volumes(std::slice::from_ref(found)))
        }
        VolumeVerb::Resize { volume: VolumeTarget { server, volume: name }, size, force } => {
            let resized: Volume = ask_server(&server, Op::VolumeResize, &Resize { name, size, force })?;
            render::one(&resized, json, |resized| render::volume_done("resized", &server, resized))
        }
        VolumeVerb::Remove { volume: VolumeTarget { server, volume: name }, force } => {
            let removed: Volume = ask_server(&server, Op::VolumeRemove, &Named { name, array: None, force })?;
            render::one(&removed, json, |removed| render::volume_done("removed", &server, removed))
        }
        VolumeVerb::Free { target: Target::Remote { server, volume: name }, force } => {
            let freed: Volume = ask_server(&server, Op::VolumeFree, &Named { name, array: None, force })?;
            render::one(&freed, json, |freed| render::volume_done("freed", &server, freed))
        }
        VolumeVerb::Free { target: Target::Local(path), force } => {
            let label = free_local(&path, force).map_err(|why| format!("{path} is not freed: {why}"))?;
            render::one(&label, json, |_| format!("freed {path}"))
        }
    }
}

/// All volumes of a server, page by page.
pub(crate) fn list(server: &ServerAddress) -> Result<Vec<Volume>, String> {
    let mut volumes: Vec<Volume> = Vec::new();
    loop {
        let after = volumes.last().map(|volume| volume.name.clone());
        let page: Page = ask_server(server, Op::VolumeList, &List { after })?;
        let more = page.more && !page.volumes.is_empty();
        volumes.extend(page.volumes);
        if !more {
            return Ok(volumes);
        }
    }
}

/// Takes the label off a local target, and returns what it said.
fn free_local(path: &str, force: bool) -> Result<Option<Label>, String> {
    let wanted = |label: Option<&Label>| match label.and_then(|label| label.array.as_ref()) {
        Some(member) if !force => Err(format!(
            "it belongs to node {} of array '{}': 'dst remove {}' frees it, or --force if that array is gone for good",
            member.node, member.name, member.name
        )),
        _ => Ok(()),
    };
    let kind = std::fs::metadata(path).map_err(|error| error.to_string())?.file_type();
    if !kind.is_block_device() {
        let beside = beside(path);
        let bytes = match std::fs::read(&beside) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            bytes => bytes.map_err(|error| format!("{beside}: {error}"))?,
        };
        let label = Label::decode(&bytes).ok();
        wanted(label.as_ref())?;
        std::fs::remove_file(&beside).map_err(|error| format!("{beside}: {error}"))?;
        return Ok(label);
    }
    let failed = |error: std::io::Error| error.to_string();
    let mut device = File::options().read(true).write(true).open(path).map_err(failed)?;
    let bytes = device.seek(SeekFrom::End(0)).map_err(failed)?;
    let mut found = None;
    for slot in slots(bytes).into_iter().flatten() {
        let mut bytes = vec![0; SLOT_BYTES];
        device.read_exact_at(&mut bytes, slot).map_err(failed)?;
        let Ok(label) = Label::decode(&bytes) else { continue };
        wanted(Some(&label))?;
        device.write_all_at(&[0; SLOT_BYTES], slot).and_then(|()| device.sync_all()).map_err(failed)?;
        found = Some(label);
    }
    Ok(found)
}
