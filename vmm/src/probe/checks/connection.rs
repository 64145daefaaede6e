//! How one connection ends, and what does not end with it.

use std::net::Shutdown;

use agent_protocol::{Reply, Request, Transfer, frame};

use super::{Scene, wrong};
use crate::agent::{Agent, AgentError};
use crate::probe::dial::Trouble;
use crate::probe::figures::{MESSAGE, judge_transfer};

/// More than sockets and credit hold together, so that it passes only if the other side takes it.
const MUCH: u64 = 4 << 20;
const SEED: u64 = 0x7072_6f62_6521;

pub(super) fn half_close_by_host(_scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    let bytes: Vec<u8> = (0..100_000).map(|at| (at % 251) as u8).collect();
    agent.send(&Request::Echo(bytes.clone()))?;
    agent.close(Shutdown::Write)?;
    match agent.reply()? {
        Reply::Echo(answer) if answer == bytes => at_its_end(&mut agent),
        _ => wrong("the answer changed".into()),
    }
}

pub(super) fn half_close_by_guest(_scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    agent.shutdown(true, false)?;
    at_its_end(&mut agent)?;
    match write_much(&mut agent) {
        Ok(()) => Ok(agent.close(Shutdown::Write)?),
        Err(AgentError::Closed) => wrong("the host's direction is closed too".into()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn no_receive_by_guest(_scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    agent.shutdown(false, true)?;
    match write_much(&mut agent) {
        Err(AgentError::Closed) => Ok(()),
        Err(AgentError::Timeout(_)) => wrong("the host's writes wait for ever".into()),
        Err(error) => Err(error.into()),
        Ok(()) => wrong(format!("{MUCH} bytes were taken from the host for nobody")),
    }
}

pub(super) fn close_by_both(scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    agent.send(&Request::Shutdown { send: true, receive: false })?;
    agent.close(Shutdown::Write)?;
    match agent.reply()? {
        Reply::Done => at_its_end(&mut agent)?,
        _ => return wrong("the agent's answer is another".into()),
    }
    Ok(scene.dialer.agent()?.ping()?)
}

pub(super) fn data_before_close_to_guest(_scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    let transfer = Transfer { to_host: 0, message: MESSAGE, to_guest: MUCH, seed: SEED };
    agent.send(&Request::Transfer(transfer))?;
    agent.write_pattern(transfer)?;
    agent.close(Shutdown::Write)?;
    judge_transfer(transfer, &agent.transferred()?)?;
    at_its_end(&mut agent)
}

pub(super) fn data_before_close_to_host(_scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    let transfer = Transfer { to_host: MUCH, message: MESSAGE, to_guest: 0, seed: SEED };
    agent.send(&Request::Transfer(transfer))?;
    agent.send(&Request::Shutdown { send: true, receive: true })?;
    agent.read_pattern(transfer)?;
    judge_transfer(transfer, &agent.transferred()?)?;
    match agent.reply()? {
        Reply::Done => at_its_end(&mut agent),
        _ => wrong("the agent's answer is another".into()),
    }
}

pub(super) fn reset_by_guest(_scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    // The prefix of a frame that is too long.
    agent.write(&u32::MAX.to_le_bytes())?;
    match agent.read(&mut [0]) {
        Ok(0) | Err(AgentError::Closed) => {}
        Ok(_) => return wrong("the agent answered nonsense".into()),
        Err(error) => return Err(error.into()),
    }
    match write_much(&mut agent) {
        Err(AgentError::Closed) => Ok(()),
        Err(error) => Err(error.into()),
        Ok(()) => wrong(format!("{MUCH} bytes were taken from the host for nobody")),
    }
}

pub(super) fn slow_reader(scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    const OTHERS: usize = 20;
    let transfer = Transfer { to_host: MUCH, message: MESSAGE, to_guest: 0, seed: SEED };
    agent.send(&Request::Transfer(transfer))?;
    let mut bystander = scene.dialer.agent()?;
    for _ in 0..OTHERS {
        scene.serves(&mut bystander)?;
    }
    agent.read_pattern(transfer)?;
    judge_transfer(transfer, &agent.transferred()?)
}

pub(super) fn vanished_client(scene: &Scene, mut agent: Agent) -> Result<(), Trouble> {
    let mut bystander = scene.dialer.agent()?;
    let transfer = Transfer { to_host: MUCH, message: MESSAGE, to_guest: MUCH, seed: SEED };
    agent.send(&Request::Transfer(transfer))?;
    // What comes is never read, so the agent is in the middle of it.
    agent.write_pattern(Transfer { to_guest: MUCH / 4, ..transfer })?;
    drop(agent);
    scene.serves(&mut bystander)
}

/// The agent sends no more.
fn at_its_end(agent: &mut Agent) -> Result<(), Trouble> {
    match agent.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => wrong("more came than the agent was asked for".into()),
        Err(AgentError::Closed) => wrong("a reset came instead of an end".into()),
        Err(AgentError::Timeout(timeout)) => wrong(format!("no end came within {timeout:?}")),
        Err(error) => Err(error.into()),
    }
}

/// Sends requests whose answers nobody reads, [`MUCH`] in all.
fn write_much(agent: &mut Agent) -> Result<(), AgentError> {
    const PIECE: usize = 64 * 1024;
    let request = frame::encode(&Request::Echo(vec![7; PIECE]))?;
    (0..MUCH / PIECE as u64).try_for_each(|_| agent.write(&request))
}
