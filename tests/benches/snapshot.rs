//! What a snapshot's files cost beside plain copies of the same bytes: written from RAM, and read into RAM for a machine.
//!
//! `cargo bench --bench snapshot` prints a table: the median of the rounds, the slowest and the fastest, and the ratio to the floor,
//! turn about. `-- --quick` shows in a moment that all of it still works.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm::kvm::cpuid;
use vmm::kvm::host::Module;
use vmm::kvm::identity::HostIdentity;
use vmm::kvm::pmu::PmuPolicy;
use vmm::memory::{Backing, GuestRam, Memory, MemoryError, PageSet, Template};
use vmm::snapshot::{Drafts, Header, PAGE, Pages, Targets, template, write};

/// As much as a machine has by default.
const RAM: u64 = 128 << 20;
/// What the agent and its image take: pages behind each other, and some that lie alone.
const IMAGE: u64 = 6 << 20;
const ALONE: u64 = 100;
/// Where RAM in no file begins to come in large pages, as the agent's does.
const LARGE: u64 = 12 << 20;

fn main() {
    let rounds = if std::env::args().any(|arg| arg == "--quick") { 1 } else { 21 };
    let dir = tempfile::tempdir().expect("make a directory");
    let kvm = vmm::kvm::open().expect("open KVM");
    let (cpuid, kind) =
        cpuid::supported(&kvm, Module::read(), PmuPolicy::Off).expect("ask for the CPUID");
    let bench = Bench { dir: dir.path(), host: HostIdentity::new(&cpuid, kind), rounds };
    bench.all();
}

struct Bench<'a> {
    dir: &'a Path,
    host: HostIdentity,
    rounds: u32,
}

impl Bench<'_> {
    fn all(&self) {
        let (memory, dirty) = used_ram();
        println!("{:<46} {:>9} {:>9} {:>19} {:>8}", "", "median", "floor", "min-max", "x floor");
        let (targets, header) = self.write(memory.ram(), Pages::All);
        let extents = extents(&header);
        self.compare(
            "a full snapshot written, not synced",
            || drop(black_box(self.write(memory.ram(), Pages::All))),
            || copy_from_ram(memory.ram(), &extents, &self.file("floor")),
        );
        let layer = || self.write(memory.ram(), Pages::Since { parent: header.id, dirty: &dirty });
        let of_layer = extents_of(&dirty);
        self.compare(
            "a layer of the pages that lie alone, not synced",
            || drop(black_box(layer())),
            || copy_from_ram(memory.ram(), &of_layer, &self.file("floor")),
        );
        self.compare(
            "a full snapshot with its names, synced",
            || self.commit(memory.ram()),
            || {
                let file = self.file("floor");
                copy_from_ram(memory.ram(), &extents, &file);
                file.sync_all().expect("sync a file");
            },
        );
        let (upper, upper_header) = layer();
        let one = [(&header, &targets.memory)];
        self.compare(
            "RAM of a full snapshot, checked",
            || drop(black_box(template(&one).expect("read a snapshot"))),
            || copy_to_memfd(&[(&targets.memory, &extents)]),
        );
        let two = [(&header, &targets.memory), (&upper_header, &upper.memory)];
        self.compare(
            "RAM of a full snapshot and a layer, checked",
            || drop(black_box(template(&two).expect("read snapshots"))),
            || copy_to_memfd(&[(&targets.memory, &extents), (&upper.memory, &of_layer)]),
        );
        let ready = template(&one).expect("read a snapshot");
        self.compare(
            "RAM of a machine mapped, beside all of it at once",
            || drop(map(Backing::extents(&ready, LARGE))),
            || drop(map(Backing::private(&ready))),
        );
        println!(
            "{} MiB of RAM, of which {} KiB in {} places are in the memory file",
            RAM >> 20,
            header.pages.stored() * PAGE >> 10,
            extents.len()
        );
    }

    fn file(&self, name: &str) -> File {
        let path = self.dir.join(name);
        // A new one: some file systems write to the medium what replaces the contents of an old one.
        let _ = std::fs::remove_file(&path);
        File::options().read(true).write(true).create_new(true).open(path).expect("make a file")
    }

    fn write(&self, ram: &GuestRam, pages: Pages<'_>) -> (Targets, Header) {
        let name = if matches!(pages, Pages::All) { "full" } else { "layer" };
        let targets = Targets {
            state: self.file(&format!("{name}.state")),
            memory: self.file(&format!("{name}.memory")),
        };
        let summary = write(&targets, self.host.clone(), &0_u8, ram, pages);
        (targets, summary.expect("write a snapshot").header)
    }

    fn commit(&self, ram: &GuestRam) {
        let (state, memory) = (self.dir.join("state"), self.dir.join("memory"));
        let drafts = Drafts::create(&state, &memory).expect("make drafts");
        let targets = drafts.targets().expect("open drafts");
        write(&targets, self.host.clone(), &0_u8, ram, Pages::All).expect("write a snapshot");
        drafts.commit().expect("name a snapshot");
    }

    fn compare(&self, what: &str, mut ours: impl FnMut(), mut floor: impl FnMut()) {
        let (mut times, mut floors) = (Vec::new(), Vec::new());
        for _ in 0..self.rounds {
            times.push(timed(&mut ours));
            floors.push(timed(&mut floor));
        }
        times.sort_unstable();
        floors.sort_unstable();
        let (median, least) = (times[times.len() / 2], floors[floors.len() / 2]);
        let us = |time: Duration| format!("{} us", time.as_micros());
        let range = format!("{}-{} us", times[0].as_micros(), times[times.len() - 1].as_micros());
        let ratio = median.as_secs_f64() / least.as_secs_f64();
        println!("{what:<46} {:>9} {:>9} {range:>19} {ratio:>8.2}", us(median), us(least));
    }
}

fn timed(work: &mut impl FnMut()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

fn map(backing: Result<Backing, MemoryError>) -> Memory {
    Memory::map(backing.expect("look at a template")).expect("map RAM")
}

/// RAM as a guest has left it: its image is the template's, the pages that lie alone are its own. Those are the second value.
fn used_ram() -> (Memory, PageSet) {
    let load = |ram: &GuestRam| {
        for at in (0..IMAGE).step_by(8) {
            ram.write_obj(at * 0x9e37_79b9, GuestAddress(at)).expect("it is RAM");
        }
        Ok::<_, MemoryError>(())
    };
    let (boot, ()) = Template::build(RAM, load).expect("make a template");
    let memory = map(Backing::contents(&boot, LARGE));
    let mut dirty = PageSet::new(RAM / PAGE);
    for number in 0..ALONE {
        let page = (IMAGE + number * (LARGE - IMAGE) / ALONE) / PAGE;
        dirty.insert(page);
        memory.ram().write_slice(&[0xa5; PAGE as usize], GuestAddress(page * PAGE)).expect("RAM");
    }
    (memory, dirty)
}

/// What is in the memory file, as starts and ends.
fn extents(header: &Header) -> Vec<(u64, u64)> {
    let stored = header.pages.extents().filter(|extent| !extent.is_empty);
    stored.map(|extent| (extent.first * PAGE, (extent.first + extent.pages) * PAGE)).collect()
}

fn extents_of(pages: &PageSet) -> Vec<(u64, u64)> {
    pages.runs().map(|(first, count)| (first * PAGE, (first + count) * PAGE)).collect()
}

/// Bytes that are copied at once.
const CHUNK: u64 = 256 << 10;

fn chunks(extents: &[(u64, u64)]) -> impl Iterator<Item = (u64, usize)> {
    extents.iter().flat_map(|(start, end)| {
        (*start..*end).step_by(CHUNK as usize).map(move |at| (at, (end - at).min(CHUNK) as usize))
    })
}

fn copy_from_ram(ram: &GuestRam, extents: &[(u64, u64)], file: &File) {
    let mut buffer = vec![0; CHUNK as usize];
    file.set_len(RAM).expect("give a file its length");
    for (at, len) in chunks(extents) {
        ram.read_slice(&mut buffer[..len], GuestAddress(at)).expect("it is RAM");
        file.write_all_at(&buffer[..len], at).expect("write a file");
    }
}

fn copy_to_memfd(files: &[(&File, &Vec<(u64, u64)>)]) {
    let mut buffer = vec![0; CHUNK as usize];
    let fill = |target: &File| {
        for (file, extents) in files {
            for (at, len) in chunks(extents) {
                file.read_exact_at(&mut buffer[..len], at).expect("read a file");
                target.write_all_at(&buffer[..len], at).expect("write a memfd");
            }
        }
        Ok::<_, MemoryError>(())
    };
    drop(black_box(Template::fill(RAM, fill).expect("make a template")));
}
