//! What the kernel's check of the performance counters concluded, from what it says (arch/x86/events/core.c). Prefix and tail of
//! its line can be separate records, so tails are matched alone.

use agent_protocol::{LogLine, PmuStatus};

/// The conclusion. A kernel that says nothing has no counters.
pub fn status(log: &[LogLine]) -> PmuStatus {
    let mut status = PmuStatus::Absent;
    for LogLine { text, .. } in log {
        if let Some((_, register)) =
            text.split_once("the BIOS has corrupted hw-PMU resources (MSR ")
            && let Some((msr, value)) = reading(register)
        {
            // The driver's line comes behind this one.
            return PmuStatus::BrokenBios { msr, value };
        }
        if text.contains("Broken PMU hardware detected") {
            status = PmuStatus::Broken;
        }
        if let Some(driver) = driver(text) {
            status = PmuStatus::Present { driver };
        }
    }
    status
}

/// `c0010200 is 530076)`, both in hexadecimal.
fn reading(text: &str) -> Option<(u32, u64)> {
    let (msr, value) = text.split_once(')')?.0.split_once(" is ")?;
    Some((u32::from_str_radix(msr, 16).ok()?, u64::from_str_radix(value, 16).ok()?))
}

fn driver(text: &str) -> Option<String> {
    let before = text.strip_suffix(" PMU driver.")?;
    Some(before.strip_prefix("Performance Events: ").unwrap_or(before).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &[&str]) -> PmuStatus {
        let line = |text: &&str| LogLine { us: 0, level: 6, text: (*text).into() };
        status(&lines.iter().map(line).collect::<Vec<_>>())
    }

    #[test]
    fn each_outcome_has_its_words() {
        let absent = "Performance Events: PMU not available due to virtualization, using software events only.";
        assert_eq!(of(&[absent]), PmuStatus::Absent);
        let unsupported =
            "Performance Events: unsupported p6 CPU model 85 no PMU driver, software events only.";
        assert_eq!(of(&[unsupported]), PmuStatus::Absent);
        assert_eq!(of(&[]), PmuStatus::Absent);
        let broken =
            "Performance Events: Broken PMU hardware detected, using software events only.";
        assert_eq!(of(&[broken]), PmuStatus::Broken);
        let present = |driver: &str| PmuStatus::Present { driver: driver.into() };
        let core = "Performance Events: Fam17h+ core perfctr, AMD PMU driver.";
        assert_eq!(of(&["Linux", core, "later"]), present("Fam17h+ core perfctr, AMD"));
    }

    #[test]
    fn prefix_and_tail_may_be_records_of_their_own() {
        let driver = PmuStatus::Present { driver: "AMD".into() };
        assert_eq!(of(&["Performance Events: ", "something else", "AMD PMU driver."]), driver);
        let corrupted =
            "[Firmware Bug]: the BIOS has corrupted hw-PMU resources (MSR c0010200 is 530076)";
        let found = PmuStatus::BrokenBios { msr: 0xc001_0200, value: 0x53_0076 };
        assert_eq!(of(&["Broken BIOS detected, complain", corrupted, "AMD PMU driver."]), found);
    }

    #[test]
    fn a_torn_complaint_is_no_reading() {
        let torn = "the BIOS has corrupted hw-PMU resources (MSR c0010200";
        assert_eq!(of(&[torn]), PmuStatus::Absent);
    }
}
