//! An owner thread: the one place where its volumes' claims, flushes and connections are.
//!
//! Contract: a volume has one owner thread for the server's life, chosen by its id. Others reach it only by [`Mail`], which is
//! taken in order.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use crate::io::buffer::BufferPool;
use crate::io::disk::aside::Aside;
use crate::io::disk::{DataFile, UringDisk};
use crate::io::ring::reactor;
use crate::io::serve::Socket;
use crate::limits;
use crate::roles::server::connection::{Connection, Counted};
use crate::roles::server::fail_stop::FailStop;
use crate::roles::server::host::{Asker, Host, Shown};
use crate::roles::server::rude::Rude;
use crate::store::record::Record;
use crate::store::region::Log;
use crate::store::state::Book;
use crate::store::volume::{Ask, Config, Conn, Event, Volume};
use crate::units::Id;
use crate::wire::frame::Header;
use crate::wire::session::Hello;
use crate::wire::volume::{LabelPut, Regions};

/// A HELLO that found its volume.
pub(crate) struct Arrival {
    pub(crate) stream: TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) hello: Hello,
    /// The HELLO's header.
    pub(crate) header: Header,
    /// The volume as it is now.
    pub(crate) record: Record,
    /// Its files, with the first arrival.
    pub(crate) files: Option<Opened>,
    pub(crate) counted: Counted,
}

/// What an owner thread needs to serve a volume.
pub(crate) struct Opened {
    pub(crate) name: String,
    pub(crate) record: Record,
    pub(crate) data: DataFile,
    pub(crate) state: DataFile,
    /// What the state file says.
    pub(crate) book: Book,
    pub(crate) log: Option<Log>,
    pub(crate) shown: Shown,
}

/// What is asked about a volume as a whole.
pub(crate) enum Question {
    Free,
    Label(LabelPut),
    Regions(Regions),
}

/// What an owner thread is told.
pub(crate) enum Mail {
    Arrival(Box<Arrival>),
    Opened(Box<Opened>),
    Ask {
        volume: Id,
        question: Question,
        asker: Asker,
    },
    Resized {
        volume: Id,
        bytes: u64,
    },
    Forget {
        volume: Id,
    },
    /// Answered when all mail before it was read: the thread goes round.
    Mark(oneshot::Sender<()>),
    Stop,
}

struct Owner {
    instance: Id,
    boot: Id,
    hosts: HashMap<Id, Rc<Host<UringDisk>>>,
    pool: Rc<BufferPool>,
    aside: Rc<Aside>,
    rude: Rude,
    connections: u64,
}

/// The thread's life.
pub(crate) fn run((instance, boot): (Id, Id), mut mailbox: mpsc::Receiver<Mail>, aside: Aside, rude: Rude) {
    let _fail_stop = FailStop;
    let ran = reactor::run(limits::SERVER_RING_ENTRIES, async move {
        let pool = Rc::new(BufferPool::new(limits::SERVER_POOL_BYTES));
        let aside = Rc::new(aside);
        let mut owner = Owner { instance, boot, hosts: HashMap::new(), pool, aside, rude, connections: 0 };
        loop {
            match mailbox.recv().await {
                Some(Mail::Arrival(arrival)) => owner.arrive(*arrival),
                Some(Mail::Opened(files)) => owner.open(*files),
                Some(Mail::Ask { volume, question, asker }) => {
                    // Without a host the asker is told so by what is dropped.
                    if let Some(host) = owner.hosts.get(&volume) {
                        let ask = match &question {
                            Question::Free => Ask::Free,
                            Question::Label(put) => Ask::Label(put),
                            Question::Regions(ask) => Ask::Regions(ask),
                        };
                        host.ask(ask, asker);
                    }
                }
                Some(Mail::Resized { volume, bytes }) => {
                    if let Some(host) = owner.hosts.get(&volume) {
                        host.resized(bytes);
                    }
                }
                Some(Mail::Forget { volume }) => {
                    if let Some(host) = owner.hosts.remove(&volume) {
                        host.close_all("its volume was removed");
                        host.retire();
                    }
                }
                Some(Mail::Mark(asked)) => drop(asked.send(())),
                Some(Mail::Stop) | None => return owner.stop().await,
            }
        }
    });
    if let Err(error) = ran {
        // What is on its way can be neither finished nor given up.
        error!(%error, "the ring of an owner thread has failed; the server ends");
        std::process::abort();
    }
}

impl Owner {
    fn arrive(&mut self, arrival: Arrival) {
        let Arrival { stream, peer, hello, header, record, files, counted } = arrival;
        if let Some(files) = files {
            self.open(files);
        }
        let host = match self.hosts.get(&record.id) {
            Some(host) => Rc::clone(host),
            // The mail is in order, so the file came before; if not, the asker connects again.
            None => return warn!(volume = hello.volume, "a connection came before its volume's file"),
        };
        let socket = match Socket::new(stream) {
            Ok(socket) => socket,
            Err(error) => return warn!(volume = hello.volume, %peer, %error, "a socket cannot be used"),
        };
        let conn = Conn(self.connections);
        self.connections += 1;
        let epoch = header.epoch;
        let connection = Connection::new(conn, peer, (hello, header), socket, counted, self.rude.clone());
        host.enter(Rc::clone(&connection));
        reactor::spawn(Rc::clone(&connection).run(Rc::clone(&host)));
        host.handle(Event::Attach { conn, hello: connection.hello(), epoch, assigned: record.array.as_ref() });
    }

    fn open(&mut self, files: Opened) {
        let Opened { name, record, data, state, book, log, shown } = files;
        info!(volume = name, direct = data.is_direct(), "opened");
        if book.durable().flush_failed {
            warn!(
                volume = name,
                "a flush of it has failed before, so every flush fails: make another volume, and copy what can be read"
            );
        }
        let (instance, boot) = (self.instance, self.boot);
        let (sparse, write_through) = (record.sparse, record.write_through);
        let config = Config { name: name.clone(), id: record.id, instance, boot, sparse, write_through };
        let rules = Volume::new(config, record.sectors(), book, log);
        let on_ring = |file| UringDisk::new(file, Rc::clone(&self.aside));
        let disks = (on_ring(data), on_ring(state));
        self.hosts.insert(record.id, Host::new(name, rules, disks, shown, Rc::clone(&self.pool)));
    }

    /// Closes everything, waits for what is on the disk, and makes durable what was written.
    async fn stop(self) {
        self.hosts.values().for_each(|host| host.close_all("the server stops"));
        let until = Instant::now() + limits::STOP_TIMEOUT;
        let is_done = |done: fn(&Host<UringDisk>) -> bool| self.hosts.values().all(|host| done(host));
        let (mut syncing, mut stopped) = (false, false);
        while !stopped {
            if Instant::now() > until {
                warn!("the disk does not answer; stopping without it");
                break;
            }
            if !syncing && is_done(Host::is_idle) {
                syncing = true;
                self.hosts.values().for_each(Host::stop);
            }
            stopped = syncing && is_done(Host::has_stopped);
            if !stopped {
                reactor::sleep(Duration::from_millis(5)).await;
            }
        }
        self.hosts.values().for_each(|host| host.retire());
    }
}
