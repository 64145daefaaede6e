//! Transfers: patterns both ways, checked on this side as the agent does on its own.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use agent_protocol::{Pattern, Reply, Request, Transfer, Transferred};

use super::{Agent, AgentError, unexpected};

/// Bytes of one write.
const MESSAGE: usize = 64 * 1024;

impl Agent {
    /// Moves bytes in either direction, or in both at once, and checks those that come. What the agent saw of the others is in
    /// its answer.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn transfer_all(&mut self, transfer: Transfer) -> Result<Transferred, AgentError> {
        self.send(&Request::Transfer(transfer))?;
        if transfer.to_host == 0 {
            let written = write_pattern(&self.stream, transfer);
            written.map_err(|error| self.classify(error))?;
            return self.transferred();
        }
        if transfer.to_guest == 0 {
            self.read_pattern(transfer)?;
            return self.transferred();
        }
        let stream = self.stream.try_clone().map_err(AgentError::Io)?;
        std::thread::scope(|scope| {
            let builder = std::thread::Builder::new();
            let writer = builder.spawn_scoped(scope, || write_pattern(&stream, transfer));
            let writer = writer.map_err(AgentError::Io)?;
            let read = self.read_pattern(transfer).and_then(|()| self.transferred());
            if read.is_err() {
                // The writer would wait for an agent that nobody hears any more.
                let _ = self.stream.shutdown(Shutdown::Both);
            }
            // A panic has ended the process.
            let written = writer.join().unwrap_or(Ok(()));
            let read = read?;
            written.map_err(|error| self.classify(error))?;
            Ok(read)
        })
    }

    /// Reads the bytes of a transfer that come to the host.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn read_pattern(&mut self, transfer: Transfer) -> Result<(), AgentError> {
        let mut pattern = Pattern::to_host(transfer.seed);
        let mut buffer = vec![0; MESSAGE];
        while pattern.position() < transfer.to_host {
            let left = usize::try_from(transfer.to_host - pattern.position()).unwrap_or(MESSAGE);
            let window = left.min(MESSAGE);
            match self.read(&mut buffer[..window])? {
                0 => return Err(AgentError::Closed),
                len => pattern.check(&buffer[..len]).map_err(AgentError::WrongByte)?,
            }
        }
        Ok(())
    }

    /// The agent's answer after a transfer.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn transferred(&mut self) -> Result<Transferred, AgentError> {
        match self.reply()? {
            Reply::Transferred(result) => Ok(result),
            other => Err(unexpected(&other)),
        }
    }

    /// Writes the bytes of a transfer that go to the guest.
    ///
    /// # Errors
    /// [`AgentError`].
    pub fn write_pattern(&mut self, transfer: Transfer) -> Result<(), AgentError> {
        write_pattern(&self.stream, transfer).map_err(|error| self.classify(error))
    }
}

/// The stream has a timeout since the request was sent.
fn write_pattern(mut stream: &UnixStream, transfer: Transfer) -> io::Result<()> {
    let mut pattern = Pattern::to_guest(transfer.seed);
    let mut buffer = vec![0; MESSAGE];
    while pattern.position() < transfer.to_guest {
        let left = usize::try_from(transfer.to_guest - pattern.position()).unwrap_or(MESSAGE);
        let len = left.min(MESSAGE);
        pattern.fill(&mut buffer[..len]);
        stream.write_all(&buffer[..len])?;
    }
    Ok(())
}
