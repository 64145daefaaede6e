//! Claims about the device as a whole, seen from a driver and from the host's sockets.

mod close;
mod connect;
mod data;
mod events;
mod expected;
mod hostile;
mod messages;
mod reset;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::packet::{ConnectionKey, GuestPort, Header, HostPort, Op, Shutdown, SocketType};
use super::testing::{TempDir, TestDriver};
use super::{GuestCid, Listener, Vsock};

fn cid() -> GuestCid {
    GuestCid::new(3).unwrap()
}

/// A device without a path.
fn pathless() -> Vsock {
    Vsock::new(cid(), None).unwrap()
}

/// A device that listens at `vsock` in `dir`.
fn listening(dir: &TempDir) -> Vsock {
    Vsock::new(cid(), Some(listener(dir))).unwrap()
}

/// A listener at `vsock` in `dir`, which takes the socket's file with it in the end.
fn listener(dir: &TempDir) -> Listener {
    let (listener, file) = Listener::bind(&dir.path("vsock")).unwrap();
    std::mem::forget(file);
    listener
}

/// A connection between the monitor and the guest: the monitor's stream, and the key.
fn connected(driver: &mut TestDriver) -> (UnixStream, ConnectionKey) {
    let stream = driver.vsock.connector().connect(GuestPort(1024)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let key = driver.accept();
    (stream, key)
}

fn key(host: u32, guest: u32) -> ConnectionKey {
    ConnectionKey { host: HostPort(host), guest: GuestPort(guest) }
}

/// Reads to the end of the stream.
fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Reads exactly `len` bytes.
fn read_exact(mut stream: &UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// Tells the host that directions are closed.
fn send_shutdown(driver: &mut TestDriver, key: ConnectionKey, directions: Shutdown) {
    let header = Header { flags: directions.flags(), ..driver.header(key, Op::Shutdown) };
    driver.send(header, &[]);
}

/// Bytes in which every position can be told from its neighbours.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ i >> 8 ^ i >> 16) as u8).collect()
}
