//! A machine that obeys orders over a socket. Without the jail here, which other tests are about.

use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::Duration;

use agent_protocol::Cause;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::boot::Payload;
use vmm::fault::{Fault, Faults};
use vmm::kvm::pmu::PmuPolicy;
use vmm::lifecycle::ResidueCheck;
use vmm::machine::{Config, Interrupts, Resources};
use vmm::sandbox::{
    self, Answer, ChannelError, Ended, Guidance, Judged, Order, Sandbox, WorkerError,
};

/// A sandbox whose inside is a thread of this process.
struct Inside {
    sandbox: Sandbox,
    thread: JoinHandle<Result<(), WorkerError>>,
}

impl Inside {
    fn start(config: Config) -> Self {
        let (sandbox, socket) = Sandbox::new().unwrap();
        let guidance =
            Guidance { residue: ResidueCheck::Compare, timeout: Duration::from_secs(20) };
        let thread = std::thread::spawn(move || {
            let (resources, _files) = Resources::open(&config).unwrap();
            let interrupts = Interrupts::catch().unwrap();
            sandbox::serve(socket, &config, guidance, resources, interrupts)
        });
        Self { sandbox, thread }
    }

    /// One that has greeted, and the verdict on its first life.
    fn booted(config: Config) -> (Self, Judged) {
        let mut inside = Self::start(config);
        let judged = inside.judged(Order::Boot { greet: true });
        (inside, judged)
    }

    fn ask(&mut self, order: Order) -> Answer {
        self.sandbox.order(&order).unwrap();
        self.next()
    }

    fn judged(&mut self, order: Order) -> Judged {
        match self.ask(order) {
            Answer::Judged(judged) => judged,
            answer => panic!("{answer:?}"),
        }
    }

    fn job(&mut self, name: &str, input: &[u8]) -> Answer {
        self.ask(Order::Job { name: name.into(), input: input.into() })
    }

    fn next(&mut self) -> Answer {
        loop {
            self.sandbox.flush().unwrap();
            if let Some(answer) = self.sandbox.answer().unwrap() {
                return answer;
            }
            let limit = Timespec { tv_sec: 30, tv_nsec: 0 };
            let mut events = PollFlags::IN;
            events.set(PollFlags::OUT, self.sandbox.has_to_flush());
            let fd = self.sandbox.as_fd();
            let ready = poll(&mut [PollFd::from_borrowed_fd(fd, events)], Some(&limit)).unwrap();
            assert_eq!(ready, 1, "the sandbox says nothing");
        }
    }

    fn end(mut self) {
        assert_eq!(self.ask(Order::End), Answer::Ended(Ended::Ordered));
        assert!(matches!(self.sandbox.answer(), Ok(None) | Err(ChannelError::Closed)));
        self.thread.join().unwrap().unwrap();
    }
}

fn agent(mem_mib: u64) -> Config {
    Config { looks_first: true, ..Config::new(Payload::Agent(None), mem_mib) }
}

#[test]
fn jobs_go_in_and_out_and_a_recycled_machine_takes_the_next() {
    let (mut inside, judged) = Inside::booted(agent(16));
    assert_eq!((judged.life, judged.cause, judged.findings), (1, Cause::PowerOn, vec![]));
    assert!(judged.report.is_some() && judged.hello_us.is_some());
    for life in 2..5 {
        let input = vec![life; 200_000];
        assert_eq!(inside.job("echo", &input), Answer::Job(input));
        let judged = inside.judged(Order::Recycle);
        assert_eq!(
            (judged.life, judged.cause, judged.findings),
            (life.into(), Cause::Host, vec![])
        );
    }
    // FIPS 180-2, appendix B.1.
    let Answer::Job(digest) = inside.job("sha256", b"abc") else { panic!("no digest") };
    assert_eq!(digest[..4], [0xba, 0x78, 0x16, 0xbf]);
    inside.end();
}

#[test]
fn a_machine_that_keeps_something_is_not_clean_when_it_is_recycled() {
    let faults = Faults::new(vec![Fault::VsockKept], PmuPolicy::Off, false).unwrap();
    let (mut inside, judged) = Inside::booted(Config { faults, ..agent(16) });
    assert_eq!(judged.findings, vec![]);
    let judged = inside.judged(Order::Recycle);
    let names: Vec<_> = judged.findings.iter().map(|finding| finding.name.as_str()).collect();
    assert_eq!(names, ["vsock-kept"]);
    inside.end();
}

#[test]
fn orders_that_cannot_be_carried_out_are_refused_and_the_machine_lives_on() {
    let mut inside = Inside::start(agent(16));
    assert!(matches!(inside.ask(Order::Verdict), Answer::Refused(why) if why.contains("booted")));
    assert_eq!(inside.ask(Order::Boot { greet: false }), Answer::Done);
    let refused = |answer: Answer, words: &str| {
        assert!(matches!(&answer, Answer::Refused(why) if why.contains(words)), "{answer:?}");
    };
    refused(inside.ask(Order::Boot { greet: true }), "runs already");
    refused(inside.ask(Order::Recycle), "hello");
    refused(inside.ask(Order::DmaAudit), "no DMA audit");
    refused(inside.job("dance", b""), "no job \"dance\"");
    refused(inside.job("spin", b"soon"), "milliseconds");
    assert_eq!(inside.job("echo", b"x"), Answer::Job(b"x".into()));
    inside.end();
}

#[test]
fn resets_nmis_and_counts_come_when_they_are_ordered() {
    let (mut inside, _) = Inside::booted(agent(16));
    assert_eq!(inside.ask(Order::Reset), Answer::Done);
    assert_eq!(inside.judged(Order::Verdict).life, 2);
    assert_eq!(inside.ask(Order::Nmi), Answer::Done);
    let judged = inside.judged(Order::Verdict);
    assert_eq!(judged.report.unwrap().nmi.total, 1);
    assert_eq!(judged.findings[0].name, "unknown-nmi");
    let Answer::Json(stats) = inside.ask(Order::Stats) else { panic!("no stats") };
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["refused_register_writes"], 0);
    assert!(matches!(inside.ask(Order::Console { lines: 5 }), Answer::Console(_)));
    inside.end();
}

#[test]
fn whoever_orders_no_more_ends_the_machine() {
    let (inside, _) = Inside::booted(agent(16));
    let Inside { sandbox, thread } = inside;
    drop(sandbox);
    let end = thread.join().unwrap();
    assert!(matches!(end, Err(WorkerError::Channel(ChannelError::Closed))), "{end:?}");
}

#[test]
fn what_the_host_lacks_is_told_before_the_end() {
    let mut inside = Inside::start(agent(1));
    let answer = inside.ask(Order::Boot { greet: true });
    assert!(
        matches!(&answer, Answer::Ended(Ended::Failed(why)) if why.contains("--mem")),
        "{answer:?}"
    );
    assert!(inside.thread.join().unwrap().is_err());
}
