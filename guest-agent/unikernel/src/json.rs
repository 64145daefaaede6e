//! The report as one line of JSON, in the shape in which the host prints it.

use alloc::string::String;

use agent_protocol::Report;

/// The line, without its end. Line breaks inside texts are escaped by JSON itself.
pub fn line(report: &Report) -> String {
    serde_json::to_string(report).expect("a report has no maps, so JSON can express it")
}

#[cfg(test)]
mod tests {
    use agent_protocol::{
        Cause, DmaReport, LogLine, MsrReading, NmiReport, PmuCpuid, PmuReport, PmuStatus, Timings,
        VsockReport,
    };

    use super::*;

    #[test]
    fn a_report_is_one_line_that_reads_back() {
        let pmu = PmuReport {
            status: PmuStatus::BrokenBios { msr: 0xc001_0200, value: 0x53_0076 },
            cpuid: PmuCpuid { vendor: *b"AuthenticAMD", ..PmuCpuid::default() },
            msrs: vec![MsrReading { index: 0xc001_0200, value: None }],
        };
        let report = Report {
            life: 2,
            cause: Some(Cause::PowerOn),
            dmesg: vec![LogLine { us: 1, level: 6, text: "two\nlines \"é\"".into() }],
            dmesg_dropped: 0,
            pmu,
            nmi: NmiReport::default(),
            exceptions: vec![],
            dma: DmaReport::default(),
            vsock: VsockReport::default(),
            timings: Timings::default(),
            linux: None,
        };
        let line = line(&report);
        assert!(!line.contains('\n'));
        assert!(line.contains(r#""cause":"power-on""#), "{line}");
        assert!(line.contains(r#"{"broken_bios":{"msr":3221291520,"value":5439606}}"#), "{line}");
        assert_eq!(serde_json::from_str::<Report>(&line).unwrap(), report);
    }
}
