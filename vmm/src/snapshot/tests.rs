mod cut_short;
mod refusals;
mod round_trip;

use std::fs::File;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::kvm::identity::tests::host;
use crate::memory::{Backing, GuestRam, Memory, MemoryError, PageSet, Template};

/// RAM of the machines here.
const RAM: u64 = 4 << 20;

/// A state as a machine might have it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    registers: Vec<u64>,
    name: String,
}

fn state() -> State {
    State { registers: vec![1, u64::MAX], name: "guest".into() }
}

/// RAM with these words at these addresses.
fn ram_with(words: &[(u64, &str)]) -> Memory {
    let load = |ram: &GuestRam| -> Result<(), MemoryError> {
        put(ram, words);
        Ok(())
    };
    let template = Template::build(RAM, load).unwrap().0;
    Memory::map(Backing::private(&template).unwrap()).unwrap()
}

fn put(ram: &GuestRam, words: &[(u64, &str)]) {
    for (address, word) in words {
        ram.write_slice(word.as_bytes(), GuestAddress(*address)).unwrap();
    }
}

/// What a machine would find that started from `template`: all that is not zero, a word for each page.
fn words_in(template: &Template) -> Vec<(u64, String)> {
    let memory = Memory::map(Backing::private(template).unwrap()).unwrap();
    let mut words = Vec::new();
    for address in (0..template.bytes()).step_by(PAGE as usize) {
        let mut page = [0; PAGE as usize];
        memory.ram().read_slice(&mut page, GuestAddress(address)).unwrap();
        if let Some(start) = page.iter().position(|byte| *byte != 0) {
            let len =
                page[start..].iter().position(|byte| *byte == 0).unwrap_or(page.len() - start);
            let word = String::from_utf8_lossy(&page[start..start + len]).into_owned();
            words.push((address + start as u64, word));
        }
    }
    words
}

fn words(expected: &[(u64, &str)]) -> Vec<(u64, String)> {
    expected.iter().map(|(address, word)| (*address, (*word).into())).collect()
}

/// The files of a snapshot, without names.
fn targets() -> Targets {
    Targets { state: tempfile::tempfile().unwrap(), memory: tempfile::tempfile().unwrap() }
}

fn pages(of: &[u64]) -> PageSet {
    let mut set = PageSet::new(RAM / PAGE);
    of.iter().for_each(|page| set.insert(*page));
    set
}

fn write_full(ram: &GuestRam) -> (Targets, Header) {
    let targets = targets();
    let summary = write(&targets, host(), &state(), ram, Pages::All).unwrap();
    (targets, summary.header)
}

fn write_layer(ram: &GuestRam, parent: &Header, dirty: &[u64]) -> (Targets, Header) {
    let targets = targets();
    let dirty = pages(dirty);
    let pages = Pages::Since { parent: parent.id, dirty: &dirty };
    let summary = write(&targets, host(), &state(), ram, pages).unwrap();
    (targets, summary.header)
}
