//! What `soak` prints and writes: a table or JSON lines, progress, bundles, and the reports for others.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::time::Duration;

use crate::cli::Error;
use crate::cli::reports::Files;
use crate::cli::run::PrintError;
use crate::progress::{Nouns, Progress};
use crate::soak::bundle::{self, Bundles, Facts};
use crate::soak::campaign::{Ending, News};
use crate::soak::figures::Figures;
use crate::soak::line::Life;
use crate::soak::plan::Plan;
use crate::soak::record::{Header, LifeRecord, Record};
use crate::soak::report::{MOST_REPLAYS, Report, Shard, table};
use crate::soak::{Place, printable};

pub(super) struct Output<'a> {
    plan: &'a Plan,
    json: bool,
    host: String,
    report: Report,
    bundles: Bundles,
    notices: BTreeSet<String>,
    progress: Progress,
    /// The first failure to write a bundle, which does not end the soak.
    bundle_failure: Option<Error>,
    /// The failure to print, which does.
    print_failure: Option<io::Error>,
}

/// Different notices; a process that was taken over could make up others.
const MOST_NOTICES: usize = 20;

impl<'a> Output<'a> {
    pub fn new(plan: &'a Plan, json: bool, bundles: Bundles) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let total = plan.resets.map(|resets| u64::from(resets) * u64::from(plan.vms));
        let shard = Shard {
            header: Header::new(plan, host.clone()),
            machine: None,
            ending: Ending::Failed,
            remark: None,
            took: None,
        };
        let (figures, replays) = (Figures::default(), Vec::new());
        let mut output = Self {
            plan,
            json,
            host,
            report: Report { shards: vec![shard], figures, replays },
            bundles,
            notices: BTreeSet::new(),
            progress: Progress::new(
                Nouns { done: "resets", wrong: "finding", wrongs: "findings" },
                total,
                plan.duration,
            ),
            bundle_failure: None,
            print_failure: None,
        };
        let header = output.report.shards[0].header.clone();
        output.record(&Record::Plan(header));
        output
    }

    /// Takes in what happened. Breaks if nobody can hear of it any more.
    pub fn hear(&mut self, news: News) -> ControlFlow<()> {
        match news {
            News::Notice(text) => self.notice(&printable(text)),
            News::Machine(machine) => self.report.shards[0].machine = Some(machine.clone()),
            News::Life(place, life) => self.life(place, life, &[]),
            News::Process(place, life, errors) => self.life(place, life, errors),
            News::Tick => {}
        }
        let figures = &self.report.figures;
        self.progress.show(|| (figures.resets(), figures.findings()));
        match self.print_failure {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    /// Says once what each machine's process would say.
    fn notice(&mut self, text: &str) {
        if self.notices.len() < MOST_NOTICES && self.notices.insert(text.into()) {
            self.progress.clear();
            let _ = writeln!(io::stderr(), "cleanslate: {text}");
        }
    }

    fn life(&mut self, place: Place, life: &Life, errors: &[String]) {
        let (mut replay, mut bundle) = (None, None);
        if !life.findings.is_empty() {
            let words = self.replay(place, life);
            bundle = self.keep(place, life, &words, errors);
            replay = Some(in_shell(&words));
        }
        self.report.figures.add(place, life, bundle.clone());
        if let Some(command) = &replay
            && self.report.replays.len() < MOST_REPLAYS
            && !self.report.replays.contains(command)
        {
            self.report.replays.push(command.clone());
        }
        if self.json {
            let (host, life) = (self.host.clone(), life.without_evidence());
            let Place { seed, vm, process } = place;
            let vm_seed = place.seed_of_process();
            let record = LifeRecord { host, seed, vm, process, vm_seed, life, bundle, replay };
            self.record(&Record::Life(Box::new(record)));
        }
    }

    /// The command that runs the machine again up to this life and the next.
    fn replay(&self, place: Place, life: &Life) -> Vec<String> {
        let resets = life.life.min(self.plan.resets.unwrap_or(u32::MAX)).max(1);
        self.plan.replay(place.vm, place.process, resets)
    }

    fn keep(
        &mut self,
        place: Place,
        life: &Life,
        replay: &[String],
        errors: &[String],
    ) -> Option<String> {
        let facts = Facts {
            host: &self.host,
            seed: place.seed,
            vm_seed: place.seed_of_process(),
            vm: place.vm,
            process: place.process,
            life: life.life,
            cause: life.cause.map(|cause| cause.name()),
            moment: life.moment.map(|moment| moment.name()),
            findings: &life.findings,
            replay: &in_shell(replay),
        };
        match self.bundles.keep(place, life, &facts, replay, errors) {
            Ok(path) => path.map(|path| path.display().to_string()),
            Err(error) => {
                self.bundle_failure.get_or_insert(error.into());
                None
            }
        }
    }

    /// How it ended: prints the result and writes the reports. Returns the exit status.
    ///
    /// # Errors
    /// `ended` was one, or something of all this could not be printed or written.
    pub fn finish(
        mut self,
        ended: Result<Ending, Error>,
        took: Duration,
        files: Files,
    ) -> Result<u8, Error> {
        self.progress.clear();
        let shard = &mut self.report.shards[0];
        shard.took = Some(took);
        match &ended {
            Ok(ending) => shard.ending = *ending,
            Err(error) => shard.remark = Some(printable(&error.to_string())),
        }
        if self.json {
            self.record(&Record::Verdict(self.report.record()));
        } else if ended.is_ok() {
            self.print(&table(&self.report));
        }
        let has_begun = self.report.figures.lives() > 0 || ended.is_ok();
        let written = if has_begun { files.write(&self.report) } else { Ok(()) };
        // In the order of what explains most.
        ended?;
        match self.print_failure {
            // A reader that went away, as `head` does, is no error of ours.
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(PrintError(error).into());
            }
            _ => {}
        }
        self.bundle_failure.map_or(Ok(()), Err)?;
        written?;
        Ok(self.report.status()?)
    }

    fn record(&mut self, record: &Record) {
        if self.json {
            self.progress.clear();
            // The types have string keys and finite numbers, so serializing cannot fail.
            let text = serde_json::to_string(record).unwrap_or_default();
            self.print(&format!("{text}\n"));
        }
    }

    fn print(&mut self, text: &str) {
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            self.print_failure.get_or_insert(error);
        }
    }
}

fn in_shell(words: &[String]) -> String {
    format!("cleanslate {}", bundle::shell(words))
}
