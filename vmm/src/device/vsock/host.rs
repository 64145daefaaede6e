//! The host's side of the device: its sockets, their events, and what becomes of both.
//!
//! Knows no queue: packets come and go through [`Host::receive`] and [`Host::send`] in `traffic.rs`.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::clients::{Clients, Decided};
use super::connection::Connection;
use super::connector::{Acceptance, Inbox, VsockConnector, Wanted};
use super::endpoint::{Endpoint, Origin};
use super::packet::{ConnectionKey, GuestCid, GuestPort, Header, HostPort, SocketType};
use super::poll::{Event, Interest, Poller, Token};
use super::stats::VsockStats;
use super::table::{MAX_CONNECTIONS, Table};
use super::unix::{Listener, VsockError};

/// Sockets, connections, and packets that belong to none.
#[derive(Debug)]
pub struct Host {
    pub(super) cid: GuestCid,
    /// The guest knows sockets for messages, as far as it has said so yet.
    pub(super) seqpacket: bool,
    pub(super) poller: Poller,
    pub(super) clients: Clients,
    inbox: Arc<Inbox>,
    /// Connections of the guest that the monitor itself waits for.
    expected: Vec<(HostPort, Acceptance, OwnedFd)>,
    pub(super) table: Table,
    /// Refusals for the guest; bounded by [`Host::must_wait`].
    pub(super) refusals: VecDeque<Header>,
    /// Connections that had events in this round.
    touched: Vec<ConnectionKey>,
    /// How long a peer may take to answer, or to finish its line.
    pub(super) patience: Duration,
    pub(super) stats: VsockStats,
}

impl Host {
    /// Serves the clients of `listener`, if there is one.
    pub fn new(
        cid: GuestCid,
        listener: Option<Listener>,
        patience: Duration,
    ) -> Result<Self, VsockError> {
        let poller = Poller::new().map_err(VsockError::Events)?;
        let inbox = Arc::new(Inbox::new().map_err(VsockError::Events)?);
        poller.add(&inbox, Token::Wake, Interest::READABLE).map_err(VsockError::Events)?;
        Ok(Self {
            cid,
            seqpacket: true,
            clients: Clients::new(listener, patience, &poller)?,
            poller,
            inbox,
            expected: Vec::new(),
            table: Table::new(),
            refusals: VecDeque::new(),
            touched: Vec::new(),
            patience,
            stats: VsockStats::default(),
        })
    }

    /// A handle that asks this host for connections.
    pub fn connector(&self) -> VsockConnector {
        VsockConnector::new(self.inbox.clone())
    }

    /// Sees to it that [`Host::handle_events`] is called again soon.
    pub fn wake(&self) {
        self.inbox.wake();
    }

    /// Handles the events that are there, within the bounds of one round.
    pub fn handle_events(&mut self) {
        // The call fails only for a bad descriptor, which would be a bug of ours that the next line of code shows.
        let Ok(events) = self.poller.poll() else { return };
        for event in events {
            match event.token {
                Token::Listener(socket_type) => {
                    self.clients.accept(socket_type, &self.poller);
                }
                Token::Wake => self.take_requests(),
                Token::Timer => self.expire(),
                Token::Client(slot) => self.read_client(slot),
                Token::Connection(key) => self.handle_connection(key, &event),
            }
        }
        self.arm_timer(self.clients.next_deadline());
    }

    fn take_requests(&mut self) {
        for wanted in self.inbox.take() {
            match wanted {
                Wanted::Connect(port, socket) => {
                    self.request(port, socket, SocketType::Stream, Origin::Monitor);
                }
                Wanted::Expect(port, acceptance, socket)
                    if self.expected.len() < MAX_CONNECTIONS =>
                {
                    self.expected.push((port, acceptance, socket));
                }
                Wanted::Expect(..) => self.stats.connections_refused += 1,
            }
        }
    }

    fn read_client(&mut self, slot: u32) {
        if let Some(Decided { socket, socket_type, port }) = self.clients.read(slot, &self.poller) {
            self.request(port, socket, socket_type, Origin::Client);
        }
    }

    /// Asks the guest for a connection on behalf of `socket`.
    fn request(
        &mut self,
        port: GuestPort,
        socket: OwnedFd,
        socket_type: SocketType,
        origin: Origin,
    ) {
        let is_known = socket_type == SocketType::Stream || self.seqpacket;
        let key = self.table.free_key(port).filter(|_| is_known);
        let endpoint = key.and_then(|key| {
            let buf_alloc = self.table.buf_alloc();
            let connection = Connection::request(self.cid, key, socket_type, buf_alloc);
            Some((key, Endpoint::new(key, connection, origin, socket, &self.poller).ok()?))
        });
        let Some((key, mut endpoint)) = endpoint else {
            self.stats.connections_refused += 1;
            return;
        };
        if origin == Origin::Client {
            endpoint.deadline = Some(Instant::now() + self.patience);
        }
        self.table.insert(key, endpoint);
        self.follow_up(key);
    }

    /// Opens a connection for the guest's request `request`. `None` if that is not possible.
    pub(super) fn accept(
        &mut self,
        key: ConnectionKey,
        socket_type: SocketType,
        request: &Header,
    ) -> Option<()> {
        if self.table.is_full() {
            return None;
        }
        let (acceptance, socket) = match self.take_expected(key.host, socket_type) {
            Some(expected) => expected,
            None => (Acceptance::AtOnce, self.clients.dial(key.host, socket_type).ok()?),
        };
        let buf_alloc = self.table.buf_alloc();
        let mut connection = Connection::accept(self.cid, key, socket_type, buf_alloc, request);
        if acceptance == Acceptance::Never {
            connection.withhold();
        }
        let endpoint = Endpoint::new(key, connection, Origin::Guest, socket, &self.poller).ok()?;
        self.table.insert(key, endpoint);
        self.stats.connections_opened += u64::from(acceptance == Acceptance::AtOnce);
        Some(())
    }

    /// The monitor's own end for a connection to `port`, if it waits for one.
    fn take_expected(
        &mut self,
        port: HostPort,
        socket_type: SocketType,
    ) -> Option<(Acceptance, OwnedFd)> {
        // What the monitor wanted before the guest asked may still be an event.
        if !self.inbox.is_empty() {
            self.take_requests();
        }
        let is_it = |(expected, ..): &(HostPort, Acceptance, OwnedFd)| *expected == port;
        let at = self.expected.iter().position(is_it);
        let (_, acceptance, socket) =
            self.expected.remove(at.filter(|_| socket_type == SocketType::Stream)?);
        Some((acceptance, socket))
    }

    fn handle_connection(&mut self, key: ConnectionKey, event: &Event) {
        let Some(endpoint) = self.table.get_mut(key) else { return };
        endpoint.handle_event(event, &mut self.stats);
        self.touched.push(key);
        self.follow_up(key);
    }

    /// Draws the conclusions after anything has happened to a connection.
    pub(super) fn follow_up(&mut self, key: ConnectionKey) {
        let Some(endpoint) = self.table.get_mut(key) else { return };
        endpoint.settle(self.patience);
        if endpoint.update_interest(&self.poller, false).is_err() {
            endpoint.fail(&mut self.stats);
        }
        if endpoint.is_finished() {
            return self.table.remove(key);
        }
        let deadline = endpoint.deadline;
        if endpoint.has_packet() {
            self.table.enqueue(key);
        }
        self.arm_timer(deadline);
    }

    /// Lets the sockets wait that had bytes in this round and could not be emptied: their turn comes when the guest has
    /// room, and until then their bytes are no event.
    pub fn park(&mut self) {
        for key in self.touched.drain(..) {
            if let Some(endpoint) = self.table.get_mut(key)
                && endpoint.update_interest(&self.poller, true).is_err()
            {
                endpoint.fail(&mut self.stats);
                self.table.enqueue(key);
            }
        }
    }

    /// Gives up on what has taken too long.
    fn expire(&mut self) {
        let now = Instant::now();
        // As with arming it.
        let _ = self.poller.disarm_timer();
        self.clients.expire(now, &self.poller);
        let late: Vec<_> = self
            .table
            .iter()
            .filter(|(_, endpoint)| endpoint.deadline.is_some_and(|deadline| deadline <= now))
            .map(|(key, _)| key)
            .collect();
        for key in late {
            if let Some(endpoint) = self.table.get_mut(key) {
                if endpoint.connection.is_requesting() {
                    self.stats.connections_refused += 1;
                }
                endpoint.end();
            }
            self.follow_up(key);
        }
        let pending = self.table.iter().filter_map(|(_, endpoint)| endpoint.deadline);
        if let Some(next) = pending.chain(self.clients.next_deadline()).min() {
            // Deadlines close to each other share one look at all connections.
            self.arm_timer(Some(next.max(now + self.patience / 50)));
        }
    }

    fn arm_timer(&mut self, deadline: Option<Instant>) {
        if let Some(deadline) = deadline {
            // The descriptor and the value are ours, so this does not fail.
            let _ = self.poller.arm_timer(deadline);
        }
    }

    /// A driver runs. If it knows no sockets for messages, those who wait for one wait in vain.
    pub fn start(&mut self, seqpacket: bool) {
        self.seqpacket = seqpacket;
        if !seqpacket {
            let messages =
                |endpoint: &Endpoint| endpoint.connection.socket_type() == SocketType::Seqpacket;
            let waiting = self.table.iter().filter(|(_, endpoint)| messages(endpoint));
            for key in waiting.map(|(key, _)| key).collect::<Vec<_>>() {
                self.table.remove(key);
                self.stats.connections_refused += 1;
            }
        }
    }

    /// Ends all connections without a word to the guest.
    pub fn drop_connections(&mut self) {
        self.table.clear();
        self.refusals.clear();
        self.touched.clear();
    }

    /// The same for those that the guest has opened, and those that it knows. What the host has asked for and the guest was not
    /// told yet stays.
    pub fn drop_guest_connections(&mut self) {
        let is_known =
            |endpoint: &Endpoint| !(endpoint.connection.is_requesting() && endpoint.queued);
        let known = self.table.iter().filter(|(_, endpoint)| is_known(endpoint));
        for key in known.map(|(key, _)| key).collect::<Vec<_>>() {
            self.table.remove(key);
        }
        self.refusals.clear();
    }

    /// Time did not run for this long.
    pub fn prolong(&mut self, by: Duration) {
        let deadlines = self.table.iter_mut().filter_map(|endpoint| endpoint.deadline.as_mut());
        deadlines.for_each(|deadline| *deadline += by);
        self.clients.prolong(by);
    }

    /// Ends everything but the listener: connections, requests that wait, clients on their way.
    pub fn reset(&mut self) {
        drop(self.inbox.take());
        self.expected = Vec::new();
        self.drop_connections();
        self.clients.clear(&self.poller);
        self.seqpacket = true;
    }
}

impl Host {
    /// Drops the requests that wait in the inbox, and refuses those that come.
    pub fn shut_down(&self) {
        self.inbox.close();
    }
}

impl AsFd for Host {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.shut_down();
    }
}
