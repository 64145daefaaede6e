//! Accounting of non-maskable interrupts in Linux's order: claimed, SERR, IOCHK, unknown
//! (arch/x86/kernel/nmi.c, `default_do_nmi`).

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent_protocol::{NmiRecord, NmiReport};

const REASON_SERR: u8 = 0x80;
const REASON_IOCHK: u8 = 0x40;

/// What the handler in ring 0 has recorded so far.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// All NMIs.
    pub total: u32,
    /// All NMIs by bits 7:6 of the reason byte.
    pub by_reason: [u32; 4],
    /// The first ones.
    pub records: Vec<NmiRecord>,
}

/// Which NMIs were expected and which were logged already.
#[derive(Debug, Default)]
pub struct NmiAccount {
    claimed: Vec<u32>,
    logged: u32,
}

impl NmiAccount {
    /// Claims the NMI with this number, counted from 0, for the agent itself.
    pub fn claim(&mut self, number: u32) {
        self.claimed.push(number);
    }

    /// The log lines (all of emergency level) for NMIs that nobody claimed, each once, with its TSC.
    pub fn log_lines(&mut self, recorded: &Recorded) -> Vec<(u64, String)> {
        let mut lines = Vec::new();
        for (number, record) in (0..).zip(&recorded.records).skip(self.logged as usize) {
            if self.claimed.contains(&number) {
                continue;
            }
            let reason = record.reason;
            let text = if reason & REASON_SERR != 0 {
                format!("NMI: PCI system error (SERR) for reason {reason:02x} on CPU 0.")
            } else if reason & REASON_IOCHK != 0 {
                format!("NMI: IOCK error (debug interrupt?) for reason {reason:02x} on CPU 0.")
            } else {
                format!("Uhhuh. NMI received for unknown reason {reason:02x} on CPU 0.")
            };
            lines.push((record.tsc, text));
            if reason & REASON_SERR != 0 || reason & REASON_IOCHK == 0 {
                let text = "Dazed and confused, but trying to continue";
                lines.push((record.tsc, text.into()));
            }
        }
        self.logged = recorded.records.len() as u32;
        lines
    }

    /// The counts. A claimed NMI counts as that alone, whatever its reason byte said.
    pub fn report(&self, recorded: &Recorded) -> NmiReport {
        let mut by_reason = recorded.by_reason;
        let claimed = self.claimed.iter().filter(|number| **number < recorded.total).count() as u32;
        for number in self.claimed.iter().filter(|number| **number < recorded.total) {
            let reason = recorded.records.get(*number as usize).map_or(0, |record| record.reason);
            let class = &mut by_reason[usize::from(reason >> 6)];
            *class = class.saturating_sub(1);
        }
        NmiReport {
            total: recorded.total,
            claimed,
            serr: by_reason[2] + by_reason[3],
            iochk: by_reason[1],
            unknown: by_reason[0],
            records: recorded.records.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(reasons: &[u8]) -> Recorded {
        let mut recorded = Recorded { total: reasons.len() as u32, ..Recorded::default() };
        for reason in reasons {
            recorded.by_reason[usize::from(reason >> 6)] += 1;
            recorded.records.push(NmiRecord { reason: *reason, tsc: 7, rip: 0 });
        }
        recorded
    }

    #[test]
    fn each_nmi_has_one_class() {
        let check = |reasons: &[u8], claimed: &[u32], expected: [u32; 4]| {
            let mut account = NmiAccount::default();
            claimed.iter().for_each(|number| account.claim(*number));
            let report = account.report(&recorded(reasons));
            let found = [report.claimed, report.serr, report.iochk, report.unknown];
            assert_eq!(found, expected, "{reasons:x?} claimed {claimed:?}");
            assert_eq!(report.total, expected.iter().sum::<u32>());
        };
        check(&[], &[], [0, 0, 0, 0]);
        check(&[0x20], &[], [0, 0, 0, 1]);
        check(&[0x20], &[0], [1, 0, 0, 0]);
        check(&[0x80, 0x40, 0xff, 0x30], &[], [0, 2, 1, 1]);
        check(&[0x80, 0x40, 0xff, 0x30], &[2], [1, 1, 1, 1]);
        check(&[0x20], &[5], [0, 0, 0, 1]);
    }

    #[test]
    fn unclaimed_ones_are_logged_once_in_linux_words() {
        let mut account = NmiAccount::default();
        account.claim(0);
        let recorded = recorded(&[0x20, 0x30, 0x80, 0x40]);
        let lines: Vec<_> =
            account.log_lines(&recorded).into_iter().map(|(_, line)| line).collect();
        assert_eq!(
            lines,
            [
                "Uhhuh. NMI received for unknown reason 30 on CPU 0.",
                "Dazed and confused, but trying to continue",
                "NMI: PCI system error (SERR) for reason 80 on CPU 0.",
                "Dazed and confused, but trying to continue",
                "NMI: IOCK error (debug interrupt?) for reason 40 on CPU 0.",
            ]
        );
        assert!(account.log_lines(&recorded).is_empty());
    }
}
