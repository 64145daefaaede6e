//! A host client of the agent: Firecracker's convention, then frames.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use agent_protocol::{AGENT_PORT, Hello, Reply, Request, frame};

/// Connects as any client of the convention does, and returns the connection and the answer.
pub fn connect(path: &Path, port: u32) -> (BufReader<UnixStream>, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    // Who is stalled fails rather than waits.
    let patience = Some(std::time::Duration::from_secs(30));
    stream.set_read_timeout(patience).unwrap();
    stream.set_write_timeout(patience).unwrap();
    // A machine in the middle of a reset closes before it reads.
    let _ = writeln!(stream, "CONNECT {port}");
    let mut stream = BufReader::new(stream);
    let mut answer = String::new();
    match stream.read_line(&mut answer) {
        Ok(_) => {}
        // Closed by the other side before it read all that we wrote.
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    (stream, answer)
}

/// Waits for a frame.
pub fn receive<T: serde::de::DeserializeOwned>(stream: &mut impl Read) -> T {
    let mut prefix = [0; frame::PREFIX_LEN];
    stream.read_exact(&mut prefix).unwrap();
    let mut bytes = prefix.to_vec();
    bytes.resize(frame::total_len(&prefix).unwrap().unwrap(), 0);
    stream.read_exact(&mut bytes[frame::PREFIX_LEN..]).unwrap();
    frame::decode(&bytes).unwrap().unwrap().0
}

/// Asks the agent for something.
pub fn ask(stream: &mut BufReader<UnixStream>, request: &Request) -> Reply {
    stream.get_mut().write_all(&frame::encode(request).unwrap()).unwrap();
    receive(stream)
}

/// A connection to the agent that has been greeted, if nothing came in between.
pub fn try_greeted(path: &Path) -> Option<(BufReader<UnixStream>, Hello)> {
    let (mut stream, answer) = connect(path, AGENT_PORT);
    if !answer.starts_with("OK ") {
        return None;
    }
    let mut bytes = Vec::new();
    loop {
        if let Some((hello, _)) = frame::decode(&bytes).unwrap() {
            return Some((stream, hello));
        }
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) => bytes.push(byte[0]),
            Ok(_) => return None,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                return None;
            }
        }
    }
}

/// A connection to the agent that has been greeted.
pub fn greeted(path: &Path) -> (BufReader<UnixStream>, Hello) {
    try_greeted(path).expect("a greeting")
}
