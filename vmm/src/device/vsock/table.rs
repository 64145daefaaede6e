//! The connections of one device, and the order in which they may speak to the guest.

use std::collections::{HashMap, VecDeque};

use super::credit::{BUF_ALLOC, SMALL_BUF_ALLOC};
use super::endpoint::Endpoint;
use super::packet::{ConnectionKey, GuestPort, HostPort};

/// Most connections that exist at once.
pub const MAX_CONNECTIONS: usize = 4000;

/// Connections that may have the large buffer at a time. The others have the small one, so that a guest or clients that never
/// read can make the host keep no more than some 80 MiB, and the kernel half as much again.
const MAX_LARGE: usize = 64;

/// Where the ports of connections that the host opens begin; Firecracker's clients know them from there.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Connections by key. A key stands in the queue at most once, and only if its endpoint says so.
#[derive(Debug)]
pub struct Table {
    endpoints: HashMap<ConnectionKey, Endpoint>,
    ready: VecDeque<ConnectionKey>,
    next_host_port: u32,
    next_parted: u32,
    /// Connections with the large buffer.
    large: usize,
}

impl Table {
    /// An empty table.
    pub fn new() -> Self {
        Self {
            endpoints: HashMap::new(),
            ready: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            next_parted: 0,
            large: 0,
        }
    }

    /// The host's port of the next connection that it opens.
    pub fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// The same as in another table; a number that it cannot have is left alone.
    pub fn continue_from(&mut self, next_host_port: u32) {
        if (FIRST_HOST_PORT..1 << 31).contains(&next_host_port) {
            self.next_host_port = next_host_port;
        }
    }

    /// True if no connection can be added.
    pub fn is_full(&self) -> bool {
        self.endpoints.len() >= MAX_CONNECTIONS
    }

    /// A key that is not in use for a connection from the host to `guest`; `None` if the table is full.
    pub fn free_key(&mut self, guest: GuestPort) -> Option<ConnectionKey> {
        if self.is_full() {
            return None;
        }
        // Ends after at most MAX_CONNECTIONS ports in use.
        loop {
            let key = ConnectionKey { host: HostPort(self.next_host_port), guest };
            let next = self.next_host_port + 1;
            self.next_host_port = if next == 1 << 31 { FIRST_HOST_PORT } else { next };
            if !self.endpoints.contains_key(&key) {
                return Some(key);
            }
        }
    }

    /// A key that is not in use for a connection that has lost its own.
    pub fn parted_key(&mut self) -> ConnectionKey {
        // Ends after at most MAX_CONNECTIONS numbers in use.
        loop {
            let key = ConnectionKey::parted(self.next_parted);
            self.next_parted = self.next_parted.wrapping_add(1);
            if !self.endpoints.contains_key(&key) {
                return key;
            }
        }
    }

    /// Bytes that the host buffers for the guest on the next connection.
    pub fn buf_alloc(&self) -> u32 {
        if self.large < MAX_LARGE { BUF_ALLOC } else { SMALL_BUF_ALLOC }
    }

    /// Adds a connection under a key that is free.
    pub fn insert(&mut self, key: ConnectionKey, endpoint: Endpoint) {
        self.large += usize::from(endpoint.connection.host_alloc() == BUF_ALLOC);
        self.endpoints.insert(key, endpoint);
    }

    /// The connection with this key.
    pub fn get_mut(&mut self, key: ConnectionKey) -> Option<&mut Endpoint> {
        self.endpoints.get_mut(&key)
    }

    /// Forgets a connection; its socket closes.
    pub fn remove(&mut self, key: ConnectionKey) {
        drop(self.take(key));
    }

    /// Takes a connection out.
    pub fn take(&mut self, key: ConnectionKey) -> Option<Endpoint> {
        let mut endpoint = self.endpoints.remove(&key)?;
        self.large -= usize::from(endpoint.connection.host_alloc() == BUF_ALLOC);
        if std::mem::take(&mut endpoint.queued) {
            self.ready.retain(|&queued| queued != key);
        }
        Some(endpoint)
    }

    /// Lets a connection speak to the guest when its turn comes.
    pub fn enqueue(&mut self, key: ConnectionKey) {
        if let Some(endpoint) = self.endpoints.get_mut(&key)
            && !endpoint.queued
        {
            endpoint.queued = true;
            self.ready.push_back(key);
        }
    }

    /// Takes the connection whose turn it is.
    pub fn dequeue(&mut self) -> Option<(ConnectionKey, &mut Endpoint)> {
        let key = self.ready.pop_front()?;
        let endpoint = self.endpoints.get_mut(&key)?;
        endpoint.queued = false;
        Some((key, endpoint))
    }

    /// The connection that [`Table::dequeue`] would take.
    pub fn first_ready(&self) -> Option<&Endpoint> {
        self.endpoints.get(self.ready.front()?)
    }

    /// True if some connection waits for its turn.
    pub fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// All connections, in no order, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Endpoint> {
        self.endpoints.values_mut()
    }

    /// All connections, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (ConnectionKey, &Endpoint)> {
        self.endpoints.iter().map(|(&key, endpoint)| (key, endpoint))
    }

    /// Forgets all connections, and the memory that they took.
    pub fn clear(&mut self) {
        self.endpoints = HashMap::new();
        self.ready = VecDeque::new();
        self.large = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::connection::Connection;
    use super::super::endpoint::Origin;
    use super::super::packet::{GuestCid, SocketType};
    use super::super::poll::Poller;
    use super::*;

    fn endpoint(key: ConnectionKey, buf_alloc: u32, poller: &Poller) -> Endpoint {
        let cid = GuestCid::new(3).unwrap();
        let connection = Connection::request(cid, key, SocketType::Stream, buf_alloc);
        let (socket, _) = UnixStream::pair().unwrap();
        Endpoint::new(key, connection, Origin::Monitor, socket.into(), poller).unwrap()
    }

    #[test]
    fn ports_in_use_are_passed_over_when_the_numbers_come_round() {
        let poller = Poller::new().unwrap();
        let mut table = Table::new();
        let take = |table: &mut Table, guest| {
            let key = table.free_key(GuestPort(guest)).unwrap();
            table.insert(key, endpoint(key, BUF_ALLOC, &poller));
            key.host.0 - FIRST_HOST_PORT
        };
        assert_eq!((take(&mut table, 7), take(&mut table, 7)), (0, 1));
        table.next_host_port = (1 << 31) - 1;
        assert_eq!(take(&mut table, 7), FIRST_HOST_PORT - 1);
        assert_eq!(take(&mut table, 7), 2);
        table.next_host_port = FIRST_HOST_PORT;
        assert_eq!(take(&mut table, 8), 0, "another port of the guest is another connection");
    }

    #[test]
    fn large_buffers_go_to_so_many_connections_at_a_time() {
        let poller = Poller::new().unwrap();
        let mut table = Table::new();
        let keys: Vec<_> = (0..MAX_LARGE + 5)
            .map(|_| {
                let key = table.free_key(GuestPort(1)).unwrap();
                table.insert(key, endpoint(key, table.buf_alloc(), &poller));
                key
            })
            .collect();
        let size = |table: &mut Table, index: usize| {
            table.get_mut(keys[index]).unwrap().connection.host_alloc()
        };
        assert_eq!(size(&mut table, MAX_LARGE - 1), BUF_ALLOC);
        assert_eq!(size(&mut table, MAX_LARGE), SMALL_BUF_ALLOC);
        table.remove(keys[MAX_LARGE + 1]);
        assert_eq!(table.buf_alloc(), SMALL_BUF_ALLOC);
        table.remove(keys[3]);
        assert_eq!(table.buf_alloc(), BUF_ALLOC);
        table.clear();
        assert_eq!((table.buf_alloc(), table.large), (BUF_ALLOC, 0));
    }
}
