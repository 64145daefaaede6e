//! What a process holds.

/// What a process holds for itself, guest RAM left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    pub descriptors: usize,
    pub threads: usize,
    pub resident_kib: u64,
}

impl Holdings {
    pub fn of(process: u32) -> Self {
        let proc = format!("/proc/{process}");
        let count = |what| std::fs::read_dir(format!("{proc}/{what}")).unwrap().count();
        let maps = std::fs::read_to_string(format!("{proc}/smaps")).unwrap();
        Self {
            descriptors: count("fd"),
            threads: count("task"),
            resident_kib: own_resident_kib(&maps),
        }
    }
}

/// Guest RAM of a machine whose size nobody gave.
const RAM: u64 = 128 << 20;

/// Memory that was written; parts of the program's file come in whenever they are needed first.
fn own_resident_kib(maps: &str) -> u64 {
    let (mut kib, mut guest_end, mut in_guest) = (0, 0, false);
    for line in maps.lines() {
        match line.split_once(':') {
            Some(("Anonymous", value)) if !in_guest => {
                kib += value.trim().trim_end_matches(" kB").parse::<u64>().unwrap();
            }
            // A mapping's first line: "start-end permissions …".
            _ => {
                let range = line.split(' ').next().and_then(|word| word.split_once('-'));
                let Some(start) = range.and_then(|(at, _)| u64::from_str_radix(at, 16).ok()) else {
                    continue;
                };
                // Only its beginning is in a file.
                if line.contains("guest-template") {
                    guest_end = start + RAM;
                }
                in_guest = start < guest_end;
            }
        }
    }
    kib
}
