//! What `soak` prints and writes: a table or JSON lines, progress, bundles, and the reports for others.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::FileError;
use crate::cli::Error;
use crate::soak::bundle::{self, Bundles, Facts};
use crate::soak::campaign::{Ending, News, Place, Plan};
use crate::soak::figures::{Figures, Histogram};
use crate::soak::line::{Found, Life, Machine};
use crate::soak::progress::Progress;
use crate::soak::report::{Report, html, junit};
use crate::soak::{printable, seed_of};
use crate::words::{milliseconds, plural};

/// Reports that were asked for.
pub(super) struct Files {
    pub junit: Option<(PathBuf, File)>,
    pub html: Option<(PathBuf, File)>,
}

/// Findings that the table shows; the others are counted.
const MOST_ROWS: usize = 50;

/// `--json`: a life.
#[derive(Serialize)]
struct LifeLine<'a> {
    host: &'a str,
    seed: u64,
    vm: u32,
    vm_seed: u64,
    life: u32,
    cause: Option<&'static str>,
    moment: Option<&'static str>,
    hello_us: Option<u64>,
    findings: &'a [Found],
    #[serde(skip_serializing_if = "Option::is_none")]
    bundle: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    replay: Option<&'a str>,
}

/// `--json`: the verdict.
#[derive(Serialize)]
struct VerdictLine<'a> {
    host: &'a str,
    seed: u64,
    /// None if the soak was interrupted or failed.
    verdict: Option<&'static str>,
    ending: Option<&'static str>,
    vms: u32,
    lives: u64,
    resets: u64,
    seconds: f64,
    findings: u64,
    names: &'a std::collections::BTreeMap<String, u64>,
    machine: Option<&'a Machine>,
}

pub(super) struct Output<'a> {
    plan: &'a Plan,
    json: bool,
    host: String,
    machine: Option<Machine>,
    figures: Figures,
    bundles: Bundles,
    replays: Vec<String>,
    progress: Progress,
    /// The first failure to write a bundle or to print. Told at the end: the soak goes on.
    failure: Option<Error>,
}

impl<'a> Output<'a> {
    pub fn new(plan: &'a Plan, json: bool, bundles: Bundles) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let total = plan.resets.map(|resets| u64::from(resets) * u64::from(plan.vms));
        Self {
            plan,
            json,
            host,
            machine: None,
            figures: Figures::default(),
            bundles,
            replays: Vec::new(),
            progress: Progress::new(total, plan.duration),
            failure: None,
        }
    }

    /// Takes in what happened.
    pub fn hear(&mut self, news: News) {
        match news {
            News::Machine(machine) => self.machine = Some(machine.clone()),
            News::Life(place, life) => self.life(place, life, &[]),
            News::Process(place, life, errors) => self.life(place, life, errors),
            News::Tick => {}
        }
        self.progress.show(self.figures.resets(), self.figures.findings());
    }

    fn life(&mut self, place: Place, life: &Life, errors: &[String]) {
        let (mut replay, mut bundle) = (None, None);
        if !life.findings.is_empty() {
            let command = self.replay(place, life);
            bundle = self.keep(place, life, &command, errors);
            replay = Some(command);
        }
        self.figures.add(place, life, bundle.clone());
        if self.json {
            let line = LifeLine {
                host: &self.host,
                seed: self.plan.seed,
                vm: place.vm,
                vm_seed: seed_of(self.plan.seed, place.vm, place.process),
                life: life.life,
                cause: life.cause.map(|cause| cause.name()),
                moment: life.moment.map(|moment| moment.name()),
                hello_us: life.hello_us,
                findings: &life.findings,
                bundle: bundle.as_deref(),
                replay: replay.as_deref(),
            };
            self.line(&serde_json::to_string(&line).unwrap_or_default());
        }
        if self.replays.len() < MOST_ROWS
            && let Some(command) = replay
            && !self.replays.contains(&command)
        {
            self.replays.push(command);
        }
    }

    /// The command that runs the machine again up to this life and the next.
    fn replay(&self, place: Place, life: &Life) -> String {
        let resets = life.life.min(self.plan.resets.unwrap_or(u32::MAX)).max(1);
        let words = self.plan.replay(place.vm, place.process, resets);
        format!("cleanslate {}", bundle::shell(&words))
    }

    fn keep(
        &mut self,
        place: Place,
        life: &Life,
        replay: &str,
        errors: &[String],
    ) -> Option<String> {
        let facts = Facts {
            host: &self.host,
            seed: self.plan.seed,
            vm_seed: seed_of(self.plan.seed, place.vm, place.process),
            vm: place.vm,
            process: place.process,
            life: life.life,
            cause: life.cause.map(|cause| cause.name()),
            moment: life.moment.map(|moment| moment.name()),
            findings: &life.findings,
            replay,
        };
        match self.bundles.keep(place, life, &facts, errors) {
            Ok(path) => path.map(|path| path.display().to_string()),
            Err(error) => {
                self.failure.get_or_insert(error.into());
                None
            }
        }
    }

    /// There will be no verdict.
    pub fn abandon(&mut self) {
        self.progress.clear();
        if self.json {
            self.verdict_line(None, None, Duration::ZERO);
        }
    }

    /// The verdict: whether everything was clean.
    ///
    /// # Errors
    /// Something of all this could not be printed or written.
    pub fn finish(mut self, ending: Ending, took: Duration, files: Files) -> Result<bool, Error> {
        self.progress.clear();
        let clean = self.figures.findings() == 0;
        let (words, verdict) = match (ending, clean) {
            (Ending::Interrupted, _) => ("interrupted", None),
            (_, true) => ("clean", Some("clean")),
            (_, false) => ("not clean", Some("findings")),
        };
        if self.json {
            self.verdict_line(verdict, Some(ending_name(ending)), took);
        } else {
            let text = self.table(words, took);
            self.print(&text);
        }
        let report = Report {
            plan: self.plan,
            host: &self.host,
            machine: self.machine.as_ref(),
            figures: &self.figures,
            replays: &self.replays,
            verdict: words,
            ending: ending_name(ending),
            took,
        };
        for (file, text) in [(files.junit, junit as fn(&Report) -> String), (files.html, html)] {
            if let Some((path, mut file)) = file {
                file.write_all(text(&report).as_bytes())
                    .map_err(|source| FileError { path, source })?;
            }
        }
        self.failure.map_or(Ok(clean), Err)
    }

    fn verdict_line(
        &mut self,
        verdict: Option<&'static str>,
        ending: Option<&'static str>,
        took: Duration,
    ) {
        let line = VerdictLine {
            host: &self.host,
            seed: self.plan.seed,
            verdict,
            ending,
            vms: self.plan.vms,
            lives: self.figures.lives(),
            resets: self.figures.resets(),
            seconds: took.as_secs_f64(),
            findings: self.figures.findings(),
            names: &self.figures.names,
            machine: self.machine.as_ref(),
        };
        let text = serde_json::to_string(&line).unwrap_or_default();
        self.line(&text);
    }

    fn table(&self, words: &str, took: Duration) -> String {
        let mut text = String::from("vm     lives  findings  hello p50  p99        max\n");
        for (number, vm) in &self.figures.vms {
            let times = times(&vm.hello);
            let (lives, findings) = (vm.lives, vm.findings);
            let _ = writeln!(text, "{number:<4} {lives:>7}  {findings:>8}  {times}");
        }
        let causes = self.figures.grouped(|(cause, _)| cause);
        let moments = self.figures.grouped(|(_, moment)| moment);
        for (title, groups) in [("cause", causes), ("moment", moments)] {
            let _ = writeln!(text, "\n{title:<12} resets     hello p50  p99        max");
            for (name, hello) in groups {
                let (resets, times) = (hello.total(), times(&hello));
                let _ = writeln!(text, "{name:<12} {resets:>6}     {times}");
            }
        }
        text.push('\n');
        for shown in self.figures.shown.iter().take(MOST_ROWS) {
            let (vm, life, name, detail) = (shown.place.vm, shown.life, &shown.name, &shown.detail);
            let _ = writeln!(text, "finding in vm {vm}, life {life}: {name}: {detail}");
            if let Some(path) = &shown.bundle {
                let _ = writeln!(text, "  bundle: {path}");
            }
        }
        let hidden = self.figures.findings().saturating_sub(MOST_ROWS as u64);
        if hidden > 0 {
            let _ = writeln!(text, "and {}", plural(hidden as usize, "finding", "findings"));
        }
        if let Some(command) = self.replays.first() {
            let _ = writeln!(text, "replay the first: {command}");
        }
        if let Some(Machine { host, pmu, .. }) = &self.machine {
            let (kernel, kvm) = (printable(&host.kernel), host.kvm.name());
            let _ = writeln!(text, "host: Linux {kernel}, {kvm}; {}", printable(pmu));
        }
        let figures = &self.figures;
        let findings = match figures.findings() as usize {
            0 => "no findings".into(),
            count => plural(count, "finding", "findings"),
        };
        let _ = writeln!(
            text,
            "{words}: {}, {}, {findings}; {:.0} resets per second; seed {}",
            plural(self.plan.vms as usize, "machine", "machines"),
            plural(figures.lives() as usize, "life", "lives"),
            figures.resets() as f64 / took.as_secs_f64().max(0.001),
            self.plan.seed,
        );
        text
    }

    fn line(&mut self, text: &str) {
        self.progress.clear();
        self.print(&format!("{text}\n"));
    }

    /// Writes to stdout. A reader that went away, as `head` does, is no error of ours.
    fn print(&mut self, text: &str) {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
        if let Err(error) = written
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            self.failure.get_or_insert(Box::new(crate::cli::run::PrintError(error)));
        }
    }
}

fn ending_name(ending: Ending) -> &'static str {
    match ending {
        Ending::Complete => "complete",
        Ending::TimeUp => "time-up",
        Ending::Finding => "finding",
        Ending::Interrupted => "interrupted",
    }
}

fn times(hello: &Histogram) -> String {
    let show = |us: Option<u64>| us.map_or("-".into(), milliseconds);
    let (p50, p99) = (hello.percentile(50), hello.percentile(99));
    format!("{:<9}  {:<9}  {}", show(p50), show(p99), show(hello.max()))
}
