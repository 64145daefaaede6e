//! What a soak is to do, and the command line of each machine's process.

use std::time::Duration;

use super::Place;
use crate::schedule::Random;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How many machines.
    pub vms: u32,
    /// The number of the first.
    pub first_vm: u32,
    /// How many resets each; none if only the time counts.
    pub resets: Option<u32>,
    /// How long at most.
    pub duration: Option<Duration>,
    /// Whether to go on after a finding.
    pub keep_going: bool,
    /// What everything random comes from.
    pub seed: u64,
    /// How long a machine's process may say nothing.
    pub silence: Duration,
    /// Arguments of `run` that are the same for each machine, but for those of its jail.
    pub arguments: Vec<String>,
    /// Arguments of the jails.
    pub jails: Jails,
}

/// What the machines' jails are told.
#[derive(Clone, Debug, Default)]
pub struct Jails {
    /// Begins each one's name; the machine's number follows.
    pub id: Option<String>,
    /// Who the jailed processes are.
    pub user: Option<Who>,
    /// Their group.
    pub group: Option<Who>,
    /// Arguments of `run` that are the same for each.
    pub arguments: Vec<String>,
}

/// A user or a group of many jails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Who {
    /// The same for all.
    Same(String),
    /// Numbers without names, counted up from this one.
    From(u32),
}

impl Who {
    /// Parses a name, a number, or `+NUMBER`.
    pub fn new(word: &str) -> Self {
        match word.strip_prefix('+').and_then(|number| number.parse().ok()) {
            Some(number) => Self::From(number),
            None => Self::Same(word.into()),
        }
    }

    /// Whether there are so many. The highest number is nobody's.
    pub fn has_enough_for(&self, count: u32) -> bool {
        match self {
            Self::Same(_) => true,
            Self::From(number) => number.checked_add(count).is_some(),
        }
    }

    /// Of the machine with this index.
    fn of(&self, index: u32) -> String {
        match self {
            Self::Same(word) => word.clone(),
            Self::From(number) => format!("+{}", number.saturating_add(index)),
        }
    }
}

impl Plan {
    /// The machines' numbers.
    pub fn machines(&self) -> impl Iterator<Item = u32> + use<> {
        self.first_vm..self.first_vm.saturating_add(self.vms)
    }

    /// The command that runs a machine again up to a reset, as arguments of the program.
    pub fn replay(&self, vm: u32, process: u32, resets: u32) -> Vec<String> {
        let seed = Place { seed: self.seed, vm, process }.seed_of_process();
        let own =
            ["run", "--resets", &resets.to_string(), "--seed", &seed.to_string()].map(String::from);
        [&own[..], &self.arguments, &self.jail(vm, process)].concat()
    }

    fn jail(&self, vm: u32, process: u32) -> Vec<String> {
        let index = vm.saturating_sub(self.first_vm);
        let mut words = self.jails.arguments.clone();
        let mut add = |option: &str, value: String| words.extend([option.into(), value]);
        if let Some(id) = &self.jails.id {
            // What is left of the process before is removed by its name, maybe not at once.
            match process {
                0 => add("--id", format!("{id}-{vm}")),
                _ => add("--id", format!("{id}-{vm}-{}", process + 1)),
            }
        }
        self.jails.user.iter().for_each(|user| add("--uid", user.of(index)));
        self.jails.group.iter().for_each(|group| add("--gid", group.of(index)));
        words
    }
}

impl Place {
    /// The seed of a machine's process: from the soak's, the machine's number, and how many processes it had before.
    pub fn seed_of_process(self) -> u64 {
        let place = (u64::from(self.vm) << 32) | u64::from(self.process);
        // Numbers of this size are the same in every reader of JSON.
        Random::new(self.seed ^ Random::new(place).number()).number() >> 11
    }
}

#[cfg(test)]
impl Plan {
    /// One machine and ten resets.
    pub fn example() -> Self {
        Self {
            vms: 1,
            first_vm: 1,
            resets: Some(10),
            duration: None,
            keep_going: false,
            seed: 42,
            silence: Duration::from_secs(1),
            arguments: vec!["--poison".into()],
            jails: Jails::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn seed_of(seed: u64, vm: u32, process: u32) -> u64 {
        Place { seed, vm, process }.seed_of_process()
    }

    #[test]
    fn every_machine_and_process_has_a_seed_of_its_own() {
        let places = (1..100).flat_map(|vm| (0..100).map(move |process| (vm, process)));
        let seeds: BTreeSet<_> = places.map(|(vm, process)| seed_of(42, vm, process)).collect();
        assert_eq!(seeds.len(), 99 * 100);
        assert!(seeds.iter().all(|seed| *seed < 1 << 53));
        assert_ne!(seed_of(1, 1, 0), seed_of(2, 1, 0));
    }

    #[test]
    fn a_replay_has_the_seed_of_its_process() {
        let plan = Plan::example();
        let words = plan.replay(1, 0, 5);
        let seed = seed_of(42, 1, 0).to_string();
        assert_eq!(words, ["run", "--resets", "5", "--seed", &seed, "--poison"]);
        assert_ne!(plan.replay(1, 1, 5)[4], seed);
    }

    #[test]
    fn every_jail_has_a_name_and_a_user_of_its_own() {
        let jails = Jails {
            id: Some("night".into()),
            user: Some(Who::new("+20000")),
            group: Some(Who::new("kvm")),
            arguments: vec!["--netns".into(), "/run/netns/blue".into()],
        };
        let plan = Plan { jails, first_vm: 5, ..Plan::example() };
        let jail = |vm, process| plan.replay(vm, process, 1)[6..].join(" ");
        assert_eq!(
            jail(5, 0),
            "--netns /run/netns/blue --id night-5 --uid +20000 --gid kvm",
            "the first has the number that was given"
        );
        assert_eq!(jail(7, 2), "--netns /run/netns/blue --id night-7-3 --uid +20002 --gid kvm");
        assert!(Who::From(u32::MAX - 2).has_enough_for(2) && Who::new("x").has_enough_for(2));
        assert!(!Who::From(u32::MAX - 1).has_enough_for(2), "the highest is nobody's");
        assert_eq!(Who::new("1000"), Who::Same("1000".into()));
        assert_eq!(Who::new("+x"), Who::Same("+x".into()));
    }
}
