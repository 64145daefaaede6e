use super::*;

fn shell(script: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script]);
    command
}

/// Runs a soak of such processes, and returns how it ended and the names of what was found.
fn soak(plan: &Plan, command: fn(&[String]) -> Command) -> (Option<Ending>, Vec<String>) {
    let (outbox, inbox) = sync_channel(256);
    let mut names = Vec::new();
    let mut listener = |news: News| {
        if let News::Life(_, life) | News::Process(_, life, _) = news {
            names.extend(life.findings.iter().map(|found| found.name.clone()));
        }
        ControlFlow::Continue(())
    };
    let ended = Campaign::new(plan, command, outbox, &mut listener).lead(&inbox);
    (ended.ok(), names)
}

const LIFE: &str = r#"echo '{"line":"life","life":1,"cause":"host","findings":[]}'"#;

#[test]
fn a_flood_is_one_finding() {
    let check = |command: fn(&[String]) -> Command| {
        for (keep_going, expected) in [(false, Ending::Finding), (true, Ending::Complete)] {
            let plan = Plan { keep_going, ..Plan::example() };
            let (ending, names) = soak(&plan, command);
            assert_eq!((ending, names), (Some(expected), vec!["vm-failed".into()]));
        }
    };
    check(|_| shell("exec yes nonsense"));
    // Of what it could say, more than there can be.
    check(|_| shell(r#"exec yes '{"line":"notice","text":""}'"#));
    // It goes on after its end: somebody else has its output.
    check(|_| shell("setsid yes nonsense & exec yes nonsense"));
}

#[test]
fn one_that_is_told_to_end_and_talks_on_is_killed() {
    const SCRIPT: &str =
        r#"trap "" TERM; exec yes '{"line":"life","life":1,"cause":"host","findings":[]}'"#;
    let duration = Some(Duration::from_millis(1));
    let plan = Plan { resets: None, duration, ..Plan::example() };
    let (outbox, inbox) = sync_channel(256);
    let mut listener = |_: News| ControlFlow::Continue(());
    let command: fn(&[String]) -> Command = |_| shell(SCRIPT);
    let ended = Campaign::new(&plan, command, outbox, &mut listener).lead(&inbox);
    assert_eq!(ended.unwrap(), Ending::TimeUp);
}

#[test]
fn a_process_that_never_lived_is_an_error_and_one_that_did_is_a_finding() {
    assert_eq!(soak(&Plan::example(), |_| shell("exit 2")), (None, Vec::new()));
    let (ending, names) = soak(&Plan::example(), |_| shell(&format!("{LIFE}; exit 2")));
    assert_eq!((ending, names), (Some(Ending::Finding), vec!["vm-failed".into()]));
}

#[test]
fn one_that_cannot_be_ended_is_given_up() {
    // What has its output lives in a session of its own, and is not killed with it.
    let plan = Plan { silence: Duration::from_millis(100), ..Plan::example() };
    let began = Instant::now();
    let (ending, names) = soak(&plan, |_| shell("setsid sleep 60 & exec sleep 60"));
    assert_eq!((ending, names), (Some(Ending::Finding), vec!["vm-hung".into()]));
    assert!(began.elapsed() < Duration::from_secs(60), "it was waited for");
}

#[test]
fn a_soak_ends_with_the_last_who_hears_of_it() {
    let (outbox, inbox) = sync_channel(256);
    let mut listener = |news: News| match news {
        News::Life(..) => ControlFlow::Break(()),
        _ => ControlFlow::Continue(()),
    };
    let plan = Plan::example();
    let command = |_: &[String]| shell(&format!("{LIFE}; exec sleep 20"));
    let ended = Campaign::new(&plan, command, outbox, &mut listener).lead(&inbox);
    assert_eq!(ended.unwrap(), Ending::Interrupted);
}
