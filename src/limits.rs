//! Every bound of the program, in one place, with its unit and its reason. Relations between them are asserted below.

use std::time::Duration;

/// Longest array or volume name, bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Most nodes of one array: an index fits 16 bits and a view stays small.
pub const NODES_MAX: usize = 1024;
/// Most replicas of one node: three can outvote one that lies, more only cost.
pub const REPLICAS_MAX: usize = 3;
/// Earlier generations that a node's generation names: a replica that was away for longer has to be added anew.
pub const ANCESTORS_MAX: usize = 64;
/// Most I/O threads (queues) of one array: every flush reads a counter of each.
pub const QUEUES_MAX: usize = 16;
/// Most shards of one array, and channels of one session: the queues, and the sync engine.
pub const SHARDS_MAX: usize = QUEUES_MAX + 1;
/// Most targets of a node: its replicas, and one that joins.
pub const TARGETS_PER_NODE_MAX: usize = REPLICAS_MAX + 1;
/// Most requests in flight in one shard (ublk allows 4096; memory is `depth` buffers per queue).
pub const DEPTH_MAX: usize = 1024;
/// Requests in flight in one shard unless said otherwise.
pub const DEPTH_DEFAULT: usize = 128;
/// Largest array, sectors: 8 EiB, so that a byte offset fits an `i64`.
pub const ARRAY_SECTORS_MAX: u64 = 1 << 54;
/// Smallest chunk of a striped array, bytes.
pub const CHUNK_BYTES_MIN: u64 = 4 << 10;
/// Largest chunk of a striped array, bytes.
pub const CHUNK_BYTES_MAX: u64 = 1 << 20;
/// Chunk of a striped array unless said otherwise, bytes.
pub const CHUNK_BYTES_DEFAULT: u64 = 64 << 10;

/// Largest payload of one frame, bytes; also the largest request of a frontend.
pub const PAYLOAD_BYTES_MAX: u32 = 1 << 20;
/// Largest range of one DISCARD or WRITE_ZEROES frame, bytes: the length field has 32 bits, and a server's disk answers in time.
pub const ZERO_BYTES_MAX: u32 = 1 << 30;
/// Largest range of one DIGEST, bytes: what a disk reads well within a request's time.
pub const DIGEST_RANGE_BYTES_MAX: u32 = 16 << 20;
/// Largest label of a volume, bytes: it must fit a message even when each of its characters is escaped.
pub const LABEL_BYTES_MAX: usize = 16 << 10;
/// The grain of sync, of the region log and of verification, bytes: what is copied again after a crash for one write.
pub const REGION_BYTES: u64 = 1 << 20;
/// Regions of a volume that has a log: what its bits take in memory stays some MiB, its pages on the disk some more. 128 TiB.
pub const REGIONS_MAX: u64 = 1 << 27;
/// Runs of regions in one answer: each takes up to 40 bytes of a message.
pub const REGION_RUNS_MAX: usize = 1024;
/// Marks are cleaned once in so many flushes that allow it: a region that is written all the time is not marked all the time.
pub const REGION_CLEAN_FLUSHES: u32 = 16;
/// Largest body of a management message or HELLO, bytes.
pub const MESSAGE_BYTES_MAX: u32 = 64 << 10;
/// Data buffer of one tag in the ublk frontend, bytes.
pub const UBLK_BUFFER_BYTES: u32 = 128 << 10;
/// A question to the ublk driver, or the deletion of a device, which it answers at once.
pub const UBLK_COMMAND: Duration = Duration::from_secs(10);
/// The start of a ublk device, in which the kernel reads the partition table: longer than any one read may take.
pub const UBLK_START: Duration = Duration::from_secs(90);
/// The stop of a ublk device, in which the kernel waits for requests in flight: longer than `IO_TIMEOUT_DEFAULT`.
pub const UBLK_STOP: Duration = Duration::from_secs(90);
/// The kernel's request timer of a ublk device: how late an old kernel may notice that the daemon died. It ends no request of a live one.
pub const UBLK_BLOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// A ublk device that is left before the process ends: its requests in flight are given this long. Its users wait meanwhile, and what has not ended
/// is only made again, so it is short: for a network that works, not for a server that is away.
pub const UBLK_QUIESCE: Duration = Duration::from_secs(1);
/// How often it is looked whether they have ended.
pub const UBLK_QUIESCE_LOOK: Duration = Duration::from_millis(2);
/// A change of a ublk device's size: the kernel does not wait for requests.
pub const UBLK_RESIZE: Duration = Duration::from_secs(10);
/// How long a queue waits for cancelled operations of a worker that has failed.
pub const UBLK_REAP: Duration = Duration::from_secs(10);
/// How often, every 100 ms, processes that have a device open are looked for before it counts as in use: udev's looks are short.
pub const UBLK_OPENER_LOOKS: usize = 20;

/// Payload and expected answers in flight on one connection, bytes: more would only queue in the sockets.
pub const LINK_BYTES_MAX: u64 = 4 << 20;
/// Requests in flight on one connection.
pub const LINK_REQUESTS_MAX: usize = 256;
/// Tags of one channel whose completed status a server keeps: as many as a shard of the greatest depth has parts.
pub const KEPT_TAGS_MAX: usize = DEPTH_MAX * 2 * TARGETS_PER_NODE_MAX;
/// Frames gathered into one send.
pub const GATHER_FRAMES_MAX: usize = 128;
/// Bytes gathered into one send.
pub const GATHER_BYTES_MAX: u64 = 1 << 20;
/// What lies in memory is copied at once, but no more of it than so many bytes before what is ready has been sent: whoever waits for
/// it takes it meanwhile.
pub const AT_ONCE_BYTES: usize = 256 << 10;
/// What lies in memory is copied by a worker of the kernel when it is at least so much, and by the thread that asks when it is less:
/// above, copying beside the thread that sends and receives brings more than handing over costs.
pub const WORKER_BYTES_MIN: u64 = 128 << 10;
/// How long a thread looks for completions before it sleeps, unless said otherwise: about what waking an idle processor costs.
pub const BUSY_POLL_DEFAULT: Duration = Duration::from_micros(50);
/// The longest that it may be told to.
pub const BUSY_POLL_MAX: Duration = Duration::from_millis(10);
/// Waits without a look after many looks in vain.
pub const BUSY_POLL_SKIPS_MAX: u32 = 255;
/// Receive staging buffer of one connection, bytes.
pub const STAGE_BYTES: usize = 128 << 10;

/// Orders from the owner that wait for one I/O thread.
pub const ORDERS_MAX: usize = 16;

/// A request that cannot be answered fails with ETIMEDOUT after this, unless said otherwise.
pub const IO_TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// A target that does not answer is left behind after this, where another one of its node has answered.
pub const REPLICA_TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// A target that is copied to is left behind when one write of the copy takes longer than this, unless said otherwise.
pub const TARGET_TIMEOUT: Duration = Duration::from_secs(1);
/// Shortest time that may be said.
pub const TARGET_TIMEOUT_MIN: Duration = Duration::from_millis(50);
/// Longest: requests of callers wait as long.
pub const TARGET_TIMEOUT_MAX: Duration = Duration::from_secs(30);
/// A move whose source is there and takes longer than its target may is tried so often, one try after the other, before it ends: a busy
/// disk is not a bad one.
pub const SOURCE_TRIES: u32 = 10;
/// Between two of them. Requests that have waited for the region that was being copied go on meanwhile.
pub const SOURCE_PAUSE: Duration = Duration::from_millis(50);
/// A stale replica is synced again at the earliest after this, when the last try has failed; doubled with each.
pub const SYNC_RETRY_MIN: Duration = Duration::from_secs(1);
/// The longest pause between two tries.
pub const SYNC_RETRY_MAX: Duration = Duration::from_secs(10);
/// The first pause after a cut-over that was rolled back because it took too long; doubled with each.
pub const CUT_OVER_RETRY_MIN: Duration = Duration::from_millis(100);
/// The longest.
pub const CUT_OVER_RETRY_MAX: Duration = Duration::from_secs(5);
/// A flush that no request waits for, before a target is in sync, may take this long: a disk with a full cache is slow, not bad.
pub const FLUSH_TIMEOUT: Duration = Duration::from_secs(30);
/// Regions that the sync engine has under way at a time, on each node.
pub const SYNC_WINDOWS: usize = 4;
/// Bytes a second that the sync engine copies at most, on each node: about what leaves a gigabit link to others.
pub const SYNC_RATE: u64 = 200 << 20;
/// A target that is copied to is flushed this often on the way: so much has to be copied again at most.
pub const SYNC_CHECKPOINT: Duration = Duration::from_secs(10);
/// Places that a scrub names of a node, one after the other: a page of them, and a record stays small. All are counted.
pub const SCRUB_FINDINGS_MAX: usize = 16;
/// Nodes of an array that are scrubbed at the same time: each of their replicas is read from end to end.
pub const SCRUBS_AT_ONCE: usize = 2;
/// A question of a scrub to a replica is given up after this, and asked again later: as long as one that is in sync is waited for.
pub const SCRUB_TIMEOUT: Duration = REPLICA_TIMEOUT_DEFAULT;
/// How often the keeper of an array's replicas looks at its links.
pub const KEEPER_TICK: Duration = Duration::from_millis(500);
/// The same while something is to be done about a replica.
pub const KEEPER_TICK_BUSY: Duration = Duration::from_millis(50);
/// A change of the replicas that could not be made durable is tried again after this.
pub const REGROUP_RETRY: Duration = Duration::from_secs(1);
/// A suspend lasts this long at most, unless said otherwise.
pub const SUSPEND_TTL_DEFAULT: Duration = Duration::from_secs(60);
/// Shortest time of a suspend.
pub const SUSPEND_TTL_MIN: Duration = Duration::from_millis(100);
/// Longest time of a suspend that has an end.
pub const SUSPEND_TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// Requests of a node wait this long at most while it is cut over, unless said otherwise.
pub const MAX_FREEZE_DEFAULT: Duration = Duration::from_millis(50);
/// Shortest `--max-freeze`.
pub const MAX_FREEZE_MIN: Duration = Duration::from_millis(1);
/// Longest `--max-freeze`: well below what a filesystem takes for a hang.
pub const MAX_FREEZE_MAX: Duration = Duration::from_secs(10);
/// Shortest time for which a migration's source is kept.
pub const KEEP_SOURCE_MIN: Duration = Duration::from_secs(1);
/// Longest time for which a migration's source is kept: each write goes to both until then.
pub const KEEP_SOURCE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);
/// The same unless said otherwise.
pub const KEEP_SOURCE_DEFAULT: Duration = Duration::from_secs(24 * 3600);
/// Migrations that are over and still known, of one array.
pub const MIGRATIONS_KEPT: usize = 64;
/// Slowest migration, bytes a second: a region each quarter of a minute.
pub const MIGRATE_RATE_MIN: u64 = 64 << 10;
/// Shortest `--io-timeout`.
pub const IO_TIMEOUT_MIN: Duration = Duration::from_millis(100);
/// Longest `--io-timeout`.
pub const IO_TIMEOUT_MAX: Duration = Duration::from_secs(24 * 3600);
/// The grain of deadlines: how often a shard looks at its clock while something is outstanding.
pub const TICK: Duration = Duration::from_millis(50);
/// First wait before a lost connection is tried again.
pub const RECONNECT_MIN: Duration = Duration::from_millis(100);
/// Tries of a start in the background that wait for a replica that is away, before the node goes on without it: about 10 s, in
/// which the machines of a site come back from a power cut at about the same time.
pub const PATIENT_TRIES: u32 = 7;
/// Longest wait between two tries.
pub const RECONNECT_MAX: Duration = Duration::from_secs(5);
/// Connecting and HELLO must be done within this.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// An idle connection says it is alive this often.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// A connection on which nothing came back for this long after a keepalive is dead.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Arrays that one daemon owns: every view lists them all.
pub const ARRAYS_MAX: usize = 256;
/// Most I/O threads of an array unless said otherwise.
pub const QUEUES_DEFAULT_MAX: usize = 4;
/// TCP port of a server unless said otherwise.
pub const PORT_DEFAULT: u16 = 20070;
/// Longest host name, bytes (RFC 1035).
pub const HOST_BYTES_MAX: usize = 253;
/// Longest path of a local target, bytes: what the kernel takes, without the final zero.
pub const PATH_BYTES_MAX: usize = 4095 - ".dst".len();
/// Longest path of the control socket, bytes: `sun_path` without the final zero.
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Largest record of an array, bytes: `NODES_MAX` nodes of `REPLICAS_MAX` replicas with the longest paths.
pub const RECORD_BYTES_MAX: u64 = 24 << 20;
/// Largest body of a request on the control socket, bytes: `NODES_MAX` targets with long names.
pub const HTTP_BODY_BYTES_MAX: usize = 1 << 20;
/// Largest head of a request on the control socket, bytes (hyper wants at least 8 KiB).
pub const HTTP_HEAD_BYTES_MAX: usize = 16 << 10;
/// Connections to the control socket at the same time; more wait in its backlog.
pub const HTTP_CONNECTIONS_MAX: usize = 64;
/// A connection to the control socket on which no request arrives for this long is closed.
pub const HTTP_IDLE_MAX: Duration = Duration::from_secs(30);
/// At the end of the daemon, answers that are ready are given this long to be sent.
pub const HTTP_GRACE: Duration = Duration::from_millis(500);
/// A request that has waited for so long is worth asking about.
pub const WHY_AGE: Duration = Duration::from_secs(1);
/// What waits that one I/O thread tells of, and that is told of all of them.
pub const WHY_MAX: usize = 64;
/// I/O threads are given this long to tell.
pub const WHY_PATIENCE: Duration = Duration::from_secs(1);
/// Files of the control tree that are open at the same time.
pub const TREE_FILES_MAX: usize = 1024;
/// How often a value is looked at that somebody waits for; only while somebody does.
pub const TREE_LOOK: Duration = Duration::from_millis(100);
/// Mounts of dead daemons, one over the other, that are taken away from one place.
pub const TREE_DEAD_MAX: usize = 16;
/// Stack of a thread of the array daemon, bytes: all of it counts as locked memory.
pub const THREAD_STACK_BYTES: usize = 512 << 10;
/// Events waiting for the owner of arrays; commands beyond it are refused.
pub const OWNER_EVENTS_MAX: usize = 256;
/// Threads that do the owner's blocking work at the same time; more work waits its turn.
pub const OWNER_HELPERS_MAX: usize = 32;
/// Servers of one array that are asked at the same time.
pub const SURVEY_THREADS_MAX: usize = 16;
/// A volume request is answered within this: a new volume's space is taken first.
pub const VOLUME_CALL_TIMEOUT: Duration = Duration::from_secs(600);
/// A stop waits this long for requests in flight.
pub const HALT_MAX: Duration = Duration::from_secs(20);
/// At the end of the daemon, what runs is given this long to be halted.
pub const SHUTDOWN_MAX: Duration = Duration::from_secs(30);

/// A program that is to go on as this daemon says its version within this.
pub const VERSION_MAX: Duration = Duration::from_secs(10);
/// After an upgrade the arrays that were started are waited for at most this long.
pub const UPGRADE_MAX: Duration = Duration::from_secs(120);
/// A service manager that does not take a message within this is not told.
pub const NOTIFY_MAX: Duration = Duration::from_secs(1);
/// Its watchdog is fed so many times in the time after which it takes the daemon for hung.
pub const WATCHDOG_BEATS: u32 = 4;

/// A peer that has not finished its HELLO or management request within this is disconnected.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// NBD: longest option of a handshake, bytes: names have at most 4096, and several queries fit.
pub const NBD_OPTION_BYTES_MAX: u32 = 16 << 10;
/// NBD: longest payload of a write that is refused but skipped, bytes: the largest request a client may send that has not asked
/// for our limit. A longer one ends the connection.
pub const NBD_SKIP_BYTES_MAX: u32 = 32 << 20;
/// NBD: connections of one I/O thread; each has a staging buffer and some bookkeeping.
pub const NBD_CONNECTIONS_MAX: usize = 64;
/// NBD: receive staging buffer of one connection, bytes.
pub const NBD_STAGE_BYTES: usize = 64 << 10;
/// NBD: what a unix socket may hold on its way to a client, bytes: the answer to a large read should not have to wait for the client.
pub const NBD_SEND_BYTES: usize = 1 << 20;
/// NBD: accepted connections that wait for one I/O thread to take them.
pub const NBD_SEATS_MAX: usize = 16;
/// NBD: how often an I/O thread looks for clients that keep others waiting; only while there may be some.
pub const NBD_TICK: Duration = Duration::from_secs(1);
/// NBD: a client that holds requests in flight and neither sends nor takes anything for this many ticks is closed if other
/// clients wait for a free request.
pub const NBD_STALL_TICKS: u64 = 30;
/// NBD: at a stop, clients that do not take their last answers are closed after this many ticks.
pub const NBD_STOP_TICKS: u64 = 5;

/// Accepted sockets that have not said HELLO, and management connections: each costs a task and a small buffer.
pub const HANDSHAKES_MAX: usize = 256;
/// Connections in one volume's table, closing ones included: several times `SHARDS_MAX`, so that a client that reconnects while
/// a slow disk still holds its former connections is not locked out.
pub const VOLUME_CONNECTIONS_MAX: usize = 128;
/// Connections of one server, all volumes together: each may have `LINK_BYTES_MAX` outstanding.
pub const SERVER_CONNECTIONS_MAX: u32 = 4096;
/// Disk operations in flight for one volume: beyond them work waits its turn, within the budgets of the connections.
pub const SERVER_LANES_MAX: usize = 256;
/// Receive staging buffer of one connection of a server, bytes: what idle connections cost at most.
pub const SERVER_STAGE_BYTES: usize = 64 << 10;
/// Owner threads of a server unless said otherwise: one per CPU, but no more than these.
pub const SERVER_THREADS_MAX: usize = 4;
/// Letters that wait for one owner thread: connections that have said HELLO, mostly.
pub const SERVER_MAILBOX_MAX: usize = 64;
/// Submission queue entries of an owner thread's ring: a full queue is handed over early, nothing is lost.
pub const SERVER_RING_ENTRIES: u32 = 1024;
/// Submission queue entries of the thread beside an owner thread: each job has one operation in flight.
pub const ASIDE_RING_ENTRIES: u32 = 64;
/// Jobs that wait for it to take them: more wait in their lanes.
pub const ASIDE_JOBS_MAX: usize = 64;
/// Polls of tasks after which an owner thread's ring has its turn, whoever is ready.
pub const REACTOR_POLLS_MAX: usize = 1024;
/// Log lines about peers that do not speak the protocol, per `SERVER_RUDE_PERIOD`: whoever scans ports must not fill the log.
pub const SERVER_RUDE_LINES_MAX: u32 = 10;
/// See `SERVER_RUDE_LINES_MAX`.
pub const SERVER_RUDE_PERIOD: Duration = Duration::from_secs(60);
/// Free data buffers that one thread of a server keeps, bytes.
pub const SERVER_POOL_BYTES: usize = 16 << 20;
/// Volumes in one page of a list: a page must fit `MESSAGE_BYTES_MAX`.
pub const LIST_PAGE_MAX: usize = 48;
/// A volume's size is a multiple of this, bytes: the page size, so that a file's last block is whole.
pub const VOLUME_BYTES_MULTIPLE: u64 = 4096;
/// Largest metadata file of a volume, bytes.
pub const VOLUME_RECORD_BYTES_MAX: u64 = 64 << 10;
/// A stopping server waits this long for what is on the disk.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(10);

const _: () = {
    assert!(LABEL_BYTES_MAX * 2 + 4096 <= MESSAGE_BYTES_MAX as usize);
    assert!(NBD_OPTION_BYTES_MAX as usize * 2 <= NBD_STAGE_BYTES);
    assert!(CHUNK_BYTES_MAX <= PAYLOAD_BYTES_MAX as u64);
    assert!(PAYLOAD_BYTES_MAX as u64 <= LINK_BYTES_MAX);
    assert!(UBLK_BUFFER_BYTES <= PAYLOAD_BYTES_MAX);
    assert!(UBLK_STOP.as_secs() > IO_TIMEOUT_DEFAULT.as_secs() && UBLK_START.as_secs() > IO_TIMEOUT_DEFAULT.as_secs());
    assert!(DEPTH_DEFAULT <= DEPTH_MAX);
    // A tag of the wire is 32 bits: 16 of them index a shard's parts.
    assert!(DEPTH_MAX * 2 * TARGETS_PER_NODE_MAX <= u16::MAX as usize);
    // A region's data is one request of the sync engine.
    assert!(REGION_BYTES <= PAYLOAD_BYTES_MAX as u64);
    assert!(LINK_REQUESTS_MAX <= u16::MAX as usize && LINK_BYTES_MAX <= u32::MAX as u64);
    assert!(VOLUME_CONNECTIONS_MAX >= SHARDS_MAX * 2);
};
