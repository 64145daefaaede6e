//! Lines of a kernel log that say that a reset left something behind. One reader for every guest, since the agent logs in
//! Linux's wording (`arch/x86/events/core.c`, `arch/x86/kernel/nmi.c`, `kernel/dma/debug.c`).

use agent_protocol::LogLine;

/// A line that a clean machine does not log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    pub name: &'static str,
    pub line: String,
}

/// What a line contains and which finding it is. The prefix of a line and its tail can be separate records, so tails
/// are matched alone.
const SUSPECTS: [(&str, &str); 8] = [
    ("the BIOS has corrupted hw-PMU resources", "pmu-corrupted"),
    ("Broken PMU hardware detected", "pmu-broken"),
    ("NMI received for unknown reason", "unknown-nmi"),
    ("NMI: PCI system error (SERR)", "serr-nmi"),
    ("NMI: IOCK error", "iochk-nmi"),
    ("New overflows for inactive PMCs", "stale-counter"),
    ("overlapping mappings aren't supported", "dma-overlap"),
    ("irq loop stuck", "stale-counter"),
];

/// The first line of each kind.
pub(super) fn findings(log: &[LogLine]) -> Vec<Suspect> {
    let mut found: Vec<Suspect> = Vec::new();
    for LogLine { text, .. } in log {
        let suspect = SUSPECTS.iter().find(|(part, _)| text.contains(part));
        if let Some((_, name)) = suspect
            && found.iter().all(|known| known.name != *name)
        {
            found.push(Suspect { name, line: text.clone() });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_trouble_are_recognized() {
        let check = |text: &str, expected: Option<&str>| {
            let log = [LogLine { us: 0, level: 6, text: text.into() }];
            let found = findings(&log);
            assert_eq!(found.first().map(|suspect| suspect.name), expected, "{text}");
        };
        check(
            "Performance Events: PMU not available due to virtualization, using software events only.",
            None,
        );
        check("Performance Events: Fam17h+ core perfctr, AMD PMU driver.", None);
        check(
            "[Firmware Bug]: the BIOS has corrupted hw-PMU resources (MSR c0010200 is 530076)",
            Some("pmu-corrupted"),
        );
        check("Uhhuh. NMI received for unknown reason 20 on CPU 0.", Some("unknown-nmi"));
        check("NMI: PCI system error (SERR) for reason b0 on CPU 0.", Some("serr-nmi"));
        check("NMI: IOCK error (debug interrupt?) for reason 60 on CPU 0.", Some("iochk-nmi"));
    }

    #[test]
    fn a_kind_is_found_once() {
        let line = LogLine {
            us: 0,
            level: 0,
            text: "Uhhuh. NMI received for unknown reason 30 on CPU 0.".into(),
        };
        assert_eq!(findings(&[line.clone(), line]).len(), 1);
    }
}
