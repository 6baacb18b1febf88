//! How the faults of the plan strike and end, and what the judge is told about them.

use dst::errno::Errno;

use dst::engine::replicas::Standing;
use dst::engine::view::{Role, View};

use crate::plan::{Fault, Kind};
use crate::world::{Event, MICRO, MILLI, SECOND, World};

/// A client must notice within this that nothing comes back any more: two keepalive intervals, on a grid of seconds.
const SILENCE_MAX: u64 = 22 * SECOND;

impl World {
    /// A fault begins.
    pub(crate) fn strike(&mut self, index: usize) {
        if self.phase != crate::world::Phase::Work {
            return;
        }
        let Fault { kind, node, lasts, .. } = self.plan.faults[index];
        let server = self.nodes[node].server;
        if kind == Kind::TakeOver {
            return self.ask_take_over(lasts);
        }
        if let Kind::Deed(deed) = kind {
            if self.operate(deed, node) {
                self.active[index] = true;
                self.queue.push(self.now + lasts, Event::Relief { fault: index });
            }
            return;
        }
        self.stats.faults += 1;
        self.trace.note(self.now, 110, index as u64);
        self.trace
            .say(self.now, || format!("!! {kind:?} node {node} server {server} for {}", crate::text::time(lasts)));
        match kind {
            Kind::Cut | Kind::CutSilent => {
                if let Some(conn) = self.some_connection(node) {
                    self.cut(conn, kind == Kind::CutSilent);
                }
                return;
            }
            Kind::Flip => return self.flip(node),
            Kind::CutAll => {
                for conn in self.connections_of(server) {
                    self.cut(conn, false);
                }
                return;
            }
            Kind::KillServer => return self.kill_server(server, lasts, false),
            Kind::StopServer => return self.stop_server(server, lasts),
            Kind::StopDaemon => return self.stop_daemon(lasts),
            Kind::KillDaemon => return self.kill_some_daemon(lasts),
            Kind::PowerCut => return self.power_cut(server, lasts),
            Kind::PowerCutAll => return self.power_cut_all(lasts),
            Kind::Partition { up, down } => {
                self.servers[server].deaf += u32::from(up);
                self.servers[server].dumb += u32::from(down);
            }
            Kind::SlowLink => self.servers[server].slow += 1,
            Kind::PauseServer => self.servers[server].paused += 1,
            Kind::PauseDaemon => {
                self.daemon.paused += 1;
                self.hosts.paused[index] = self.daemon.number;
            }
            Kind::SlowDisk => self.nodes[node].slow += 1,
            Kind::StallDisk => self.nodes[node].stalled += 1,
            Kind::Deed(_) | Kind::TakeOver => {}
        }
        self.active[index] = true;
        self.trouble(kind, node, true);
        self.see_slow();
        self.queue.push(self.now + lasts, Event::Relief { fault: index });
    }

    /// A fault ends, if it is on.
    pub(crate) fn relief(&mut self, index: usize) {
        if !std::mem::take(&mut self.active[index]) {
            return;
        }
        let Fault { kind, node, .. } = self.plan.faults[index];
        if let Kind::Deed(deed) = kind {
            return self.operated(deed, node);
        }
        let server = self.nodes[node].server;
        self.trace.note(self.now, 111, index as u64);
        self.trace.say(self.now, || format!("!! {kind:?} node {node} server {server} is over"));
        self.trouble(kind, node, false);
        match kind {
            Kind::Partition { up, down } => {
                self.servers[server].deaf -= u32::from(up);
                self.servers[server].dumb -= u32::from(down);
                self.wake_server(server);
            }
            Kind::SlowLink => self.servers[server].slow -= 1,
            Kind::PauseServer => {
                self.servers[server].paused -= 1;
                self.wake_server(server);
            }
            Kind::PauseDaemon => self.with_daemon(self.hosts.paused[index], |world| {
                world.daemon.paused -= 1;
                if world.daemon.paused == 0 {
                    world.judge.resumed(world.now);
                    world.daemon_resumed();
                }
            }),
            Kind::SlowDisk => self.nodes[node].slow -= 1,
            Kind::StallDisk => {
                self.nodes[node].stalled -= 1;
                self.disk_resumed(node);
            }
            _ => {}
        }
        self.see_slow();
    }

    fn trouble(&mut self, kind: Kind, node: usize, begins: bool) {
        let nodes: Vec<usize> = match kind {
            Kind::SlowDisk | Kind::StallDisk => vec![node],
            Kind::PauseDaemon => return self.daemon_trouble(begins),
            _ => self.nodes_of(self.nodes[node].server),
        };
        for node in nodes {
            self.node_trouble(node, begins);
        }
    }

    /// Slow is not silent: a copy that answers late is waited for, while it is in sync or from when it came to be.
    pub(crate) fn see_slow(&mut self) {
        if self.plan.copies < 2 {
            return;
        }
        for target in 0..self.nodes.len() {
            let slow = self.nodes[target].slow > 0 || self.servers[self.nodes[target].server].slow > 0;
            let (was, is) = (self.awaited[target], slow && (self.awaited[target] || self.matters(target)));
            self.awaited[target] = is;
            let device = u16::try_from(self.plan.node_of(target)).unwrap_or(0);
            match (was, is) {
                (false, true) => self.judge.excuses.trouble(self.now, device),
                (true, false) => self.judge.excuses.relief(self.now, device),
                _ => {}
            }
        }
    }

    /// No device answers, because the daemon does not ask. Afterwards replicas may differ, and one alone may be in sync.
    pub(crate) fn daemon_trouble(&mut self, begins: bool) {
        if self.hosts.is_former() {
            return;
        }
        for target in 0..self.nodes.len() {
            self.spoil(target);
        }
        for device in 0..u16::try_from(self.plan.volumes.len()).unwrap_or(0) {
            if begins {
                self.judge.excuses.trouble(self.now, device);
            } else {
                self.judge.excuses.relief(self.now, device);
            }
        }
    }

    /// A target is touched by a fault: from now on it may lack something. Whether no other one of its node has everything.
    pub(crate) fn spoil(&mut self, target: usize) -> bool {
        let node = self.plan.node_of(target);
        let device = u16::try_from(node).unwrap_or(0);
        self.spoiled[target] = true;
        if self.plan.copies > 1 {
            self.judge.excuses.blemished(device);
        }
        self.condemn();
        self.in_sync(node).iter().all(|target| self.spoiled[*target])
    }

    /// A node none of whose good copies was spared may do anything but lie.
    pub(crate) fn condemn(&mut self) {
        for node in 0..if self.plan.copies > 1 { self.plan.volumes.len() } else { 0 } {
            if self.in_sync(node).iter().all(|target| self.spoiled[*target]) {
                self.judge.excuses.condemned(u16::try_from(node).unwrap_or(0));
            }
        }
    }

    /// Whether what a target does is more than a matter of its own: it is read, or was when it was last written down.
    pub(crate) fn matters(&self, target: usize) -> bool {
        let in_sync = self.record.standings[target] == Standing::InSync;
        let owner = self.daemon.owner.as_ref();
        in_sync || owner.is_some_and(|owner| owner.rules.role(target) == Role::InSync)
    }

    /// What a view shuts waits for it, and for the slow ones that it counts in.
    pub(crate) fn show_view(&mut self, view: &View) {
        if self.hosts.is_former() {
            return;
        }
        for (number, node) in view.nodes.iter().enumerate() {
            let shut = node.gate.is_shut();
            self.judge.excuses.suspended(self.now, u16::try_from(number).unwrap_or(0), shut);
        }
        self.see_slow();
    }

    /// A target's disk or server answers late or not at all, for one reason more or less.
    pub(crate) fn node_trouble(&mut self, target: usize, begins: bool) {
        if begins {
            self.spoil(target);
        }
        if self.plan.copies > 1 {
            return;
        }
        let device = u16::try_from(self.plan.node_of(target)).unwrap_or(0);
        if begins {
            self.judge.excuses.trouble(self.now, device);
        } else {
            self.judge.excuses.relief(self.now, device);
        }
    }

    /// The nodes that a server holds.
    pub(crate) fn nodes_of(&self, server: usize) -> Vec<usize> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].server == server).collect()
    }

    fn connections_of(&self, server: usize) -> Vec<usize> {
        let linked = self.all_connections();
        linked.into_iter().filter(|conn| self.nodes[self.conns[*conn].node].server == server).collect()
    }

    fn some_connection(&mut self, node: usize) -> Option<usize> {
        let mut linked = self.all_connections();
        linked.retain(|conn| self.conns[*conn].node == node);
        if linked.is_empty() { None } else { Some(self.rng.pick(&linked)) }
    }

    /// A connection breaks, at any byte of either direction; each side learns of it in its own time, or not at all.
    pub(crate) fn cut(&mut self, conn: usize, silent: bool) {
        let node = self.conns[conn].node;
        if self.conns[conn].up.cut && self.conns[conn].down.cut {
            return;
        }
        self.trace.say(self.now, || format!("!! connection {conn} breaks"));
        self.node_trouble(node, true);
        if !silent {
            self.node_trouble(node, false);
        }
        let server_learns = self.rng.percent(60);
        let speed = self.speed(node);
        let (now, rng) = (self.now, &mut self.rng);
        let end = &mut self.conns[conn];
        end.up.cut(rng);
        end.down.cut(rng);
        end.silent = silent;
        if silent {
            self.queue.push(now + SILENCE_MAX, Event::Noticed { conn });
        }
        let later = |rng: &mut crate::rng::Rng| now + speed.latency + rng.below(5 * MILLI) + MICRO;
        // Frames that were kept arrive before anybody learns of the end.
        if server_learns {
            end.up.cut = false;
            let at = later(rng);
            end.up.end(at, speed, rng, Errno::ECONNRESET);
            self.schedule_up(conn);
        }
        if !silent {
            let end = &mut self.conns[conn];
            end.down.cut = false;
            let at = later(&mut self.rng);
            end.down.end(at, speed, &mut self.rng, Errno::ECONNRESET);
        }
        self.schedule_down(conn);
    }

    /// The client has noticed a silent end, or should have.
    pub(crate) fn noticed(&mut self, conn: usize) {
        if std::mem::take(&mut self.conns[conn].silent) {
            self.node_trouble(self.conns[conn].node, false);
        }
    }

    /// One server's machine loses power; with it the array's, unless each of its nodes has a copy that no fault has touched.
    fn power_cut(&mut self, server: usize, lasts: u64) {
        let has_good_copy = |target: &usize| {
            let others = self.in_sync(self.plan.node_of(*target));
            let good = |other: &usize| !self.spoiled[*other] && self.nodes[*other].server != server;
            !self.matters(*target) || (self.plan.copies > 1 && others.iter().any(good))
        };
        if !self.nodes_of(server).iter().all(has_good_copy) {
            self.kill_daemon(lasts, true);
        }
        // It may be back before anybody has missed it.
        let soon = self.daemon.is_up() && self.rng.percent(50);
        self.kill_server(server, if soon { lasts.min(50 * MILLI) } else { lasts }, true);
    }

    /// Everything loses power.
    pub(crate) fn power_cut_all(&mut self, lasts: u64) {
        self.hosts_lose_power(lasts);
        self.kill_daemon(lasts, true);
        for server in 0..self.servers.len() {
            self.kill_server(server, lasts, true);
        }
    }
}
