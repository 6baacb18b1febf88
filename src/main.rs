//! `dstd`: parse arguments, pick the role, run it. No logic lives here.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use dst::control::target::ServerAddress;
use dst::io::config::ConfigFile;
use dst::io::ring::busy;
use dst::limits;
use dst::roles::array::daemon;
use dst::roles::array::launch::DataPaths;
use dst::roles::server;
use dst::roles::up;
use dst::units::parse_duration;

#[path = "main/pages.rs"]
mod pages;

/// The daemon of dst: stores volumes (server), or makes block devices of them (array).
#[derive(Parser)]
#[command(
    name = "dstd",
    version,
    max_term_width = 100,
    after_help = "Flags win over the configuration file. `dst` is the command line to it."
)]
struct Arguments {
    /// Configuration file [default: /etc/dst/dstd.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What is logged to stderr: error, warn, info, debug, or a filter such as info,dst::io=debug [default: info]
    #[arg(long, global = true, value_name = "FILTER", env = "DST_LOG")]
    log: Option<String>,
    /// How long an I/O thread looks for what is due before it sleeps, such as 50us; 0s: not at all. Shorter waits, for some time of
    /// a processor; what is not due soon is not waited for [default: 50us]
    #[arg(long, global = true, value_name = "TIME", value_parser = parse_duration, env = "DST_BUSY_POLL")]
    busy_poll: Option<Duration>,
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// Stores volumes and serves them over TCP
    #[command(after_help = "Example:\n  dstd server --listen 0.0.0.0:20070 --pool /srv/dst --danger-cleartext")]
    Server(ServerArguments),
    /// Owns the arrays of this machine: makes block devices of volumes
    #[command(after_help = "Example:\n  dstd array &\n  dst list")]
    Array(ArrayArguments),
    /// Runs both in one process, with everything under one directory: the quick start
    #[command(after_help = "Example:\n  dstd up --dir /var/tmp/dst &\n  export DST_SOCKET=/var/tmp/dst/dstd.sock\n  \
                            dst volume create 127.0.0.1:20070/a --size 1G")]
    Up(UpArguments),
    /// Writes the manual pages and the shell completions of dstd
    #[command(hide = true)]
    Generate(pages::GenerateArguments),
}

#[derive(Args)]
struct ServerArguments {
    /// Where to listen; may be given several times [default: 127.0.0.1:20070]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Vec<String>,
    /// The directory that volumes live in; made if it is not there
    #[arg(long, value_name = "DIR")]
    pool: Option<PathBuf>,
    /// I/O threads [default: one per CPU, at most 4]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Listen beyond loopback although nothing is encrypted or authenticated: on a network that you trust
    #[arg(long)]
    danger_cleartext: bool,
}

#[derive(Args)]
struct ArrayArguments {
    /// Where the records of arrays are kept [default: /var/lib/dst]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where what lives as long as the daemon is kept [default: /run/dst]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The control socket [default: dstd.sock in the run directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Mount the control tree on this directory, such as /run/dst/tree: what 'dst tree' shows, as files
    #[arg(long, value_name = "DIR")]
    tree: Option<PathBuf>,
    /// Serve figures for Prometheus at http://ADDR:PORT/metrics; the control socket has them, too
    #[arg(long, value_name = "ADDR:PORT")]
    metrics: Option<SocketAddr>,
    /// Let --metrics be beyond loopback although nothing is encrypted or authenticated: on a network that you trust
    #[arg(long)]
    danger_cleartext: bool,
}

#[derive(Args)]
struct UpArguments {
    /// Holds the pool, the records and the socket; made if it is not there
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Where the server listens; may be given several times [default: 127.0.0.1:20070]
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Vec<String>,
    /// The control socket [default: dstd.sock in the directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Listen beyond loopback although nothing is encrypted or authenticated: on a network that you trust
    #[arg(long)]
    danger_cleartext: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("dstd: {why}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<(), String> {
    if let Role::Generate(given) = &arguments.role {
        return given.run(Arguments::command(), "8");
    }
    let file = ConfigFile::read(arguments.config.as_deref())?;
    log_to_stderr(arguments.log.or(file.log.clone()).as_deref().unwrap_or("info"))?;
    busy::set_window(busy_poll(arguments.busy_poll, file.busy_poll.as_deref())?);
    match arguments.role {
        Role::Server(given) => server::run(server_config(given, file)?).map_err(|error| error.to_string()),
        Role::Array(given) => {
            daemon::run(&array_config(given, file), Box::new(DataPaths)).map_err(|error| error.to_string())
        }
        Role::Up(given) => {
            let config = up::Config {
                dir: std::path::absolute(given.dir).map_err(|error| error.to_string())?,
                listen: addresses(given.listen)?,
                danger_cleartext: given.danger_cleartext,
                socket: given.socket,
            };
            up::run(config, Box::new(DataPaths)).map_err(|error| error.to_string())
        }
        // It was done before anything was read.
        Role::Generate(_) => Ok(()),
    }
}

fn busy_poll(given: Option<Duration>, file: Option<&str>) -> Result<Duration, String> {
    let in_file = || file.map(parse_duration).transpose().map_err(|error| format!("busy-poll: {error}"));
    let window = match given {
        Some(window) => window,
        None => in_file()?.unwrap_or(limits::BUSY_POLL_DEFAULT),
    };
    if window > limits::BUSY_POLL_MAX {
        let most = limits::BUSY_POLL_MAX.as_millis();
        return Err(format!(
            "busy-poll: looking for longer than {most}ms would be for nothing; 50us is usual, 0s turns it off"
        ));
    }
    Ok(window)
}

fn log_to_stderr(filter: &str) -> Result<(), String> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).map_err(|error| format!("--log {filter}: {error}"))?;
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(terminal)
        .with_target(false)
        .init();
    Ok(())
}

fn server_config(given: ServerArguments, file: ConfigFile) -> Result<server::Config, String> {
    let listen = if given.listen.is_empty() { file.server.listen } else { given.listen };
    let pool = given.pool.or(file.server.pool);
    Ok(server::Config {
        listen: addresses(listen)?,
        pool: pool.ok_or("no pool: say where volumes live with --pool DIR")?,
        threads: given.threads.or(file.server.threads).unwrap_or(0),
        danger_cleartext: given.danger_cleartext || file.server.danger_cleartext,
    })
}

fn array_config(given: ArrayArguments, file: ConfigFile) -> daemon::Config {
    let run_dir = given.run_dir.or(file.array.run_dir).unwrap_or_else(|| PathBuf::from("/run/dst"));
    daemon::Config {
        state_dir: given.state_dir.or(file.array.state_dir).unwrap_or_else(|| PathBuf::from("/var/lib/dst")),
        socket: given.socket.or(file.array.socket).unwrap_or_else(|| run_dir.join("dstd.sock")),
        tree: given.tree.or(file.array.tree),
        metrics: given.metrics.or(file.array.metrics),
        alone: true,
        danger_cleartext: given.danger_cleartext || file.array.danger_cleartext,
    }
}

fn addresses(listen: Vec<String>) -> Result<Vec<SocketAddr>, String> {
    let listen = if listen.is_empty() { vec![format!("127.0.0.1:{}", limits::PORT_DEFAULT)] } else { listen };
    let mut addresses = Vec::new();
    for text in listen {
        // Port 0, a free one, is for those who listen only.
        let found = match text.parse::<SocketAddr>() {
            Ok(address) => vec![address],
            Err(_) => {
                let server: ServerAddress = text.parse()?;
                let looked_up = (server.host.as_str(), server.port).to_socket_addrs();
                looked_up.map_err(|error| format!("--listen {text}: {error}"))?.collect()
            }
        };
        addresses.extend(found);
    }
    Ok(addresses)
}
