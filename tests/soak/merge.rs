//! `merge`: the lines of many soaks become one report.

use std::fs;

use serde_json::Value;

use crate::harness::{file, run, temp_dir};

#[test]
fn two_shards_report_as_one_soak() {
    let dir = temp_dir();
    let shard = |first: &str, status| {
        let options = ["soak", "--json", "--vms", "2", "--resets", "6", "--seed", "7"];
        let more = ["--first-vm", first, "--keep-going", "--inject", "fpu-kept", "--bundle"];
        let bundle = dir.path().join(format!("bundle{first}"));
        let all = [&options[..], &more, &[bundle.to_str().unwrap()]].concat();
        file(&dir, &format!("from{first}"), run(&all).expect_status(status).stdout.as_bytes())
    };
    let (first, second) = (shard("1", 1), shard("3", 1));
    let (first, second) = (first.to_str().unwrap(), second.to_str().unwrap());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (xml, page) = (path("xml"), path("page"));
    let table = run(&["merge", first, second, "--junit", &xml, "--html", &page])
        .expect_status(1)
        .expect_stdout("not clean: 4 machines, 28 lives, 24 findings; ")
        .expect_stdout("replay the first: cleanslate run --resets 2 ");
    for row in ["1  ", "4  ", "finding in vm 4, life "] {
        assert!(table.stdout.lines().any(|line| line.starts_with(row)), "{row}: {table}");
    }
    let xml = fs::read_to_string(xml).unwrap();
    assert!(xml.contains("tests=\"4\" failures=\"4\" errors=\"0\""), "{xml}");
    let page = fs::read_to_string(page).unwrap();
    assert!(page.contains("4 machines, 28 lives, 24 findings"), "{page}");
    let json = run(&["merge", "--json", second, first]).expect_status(1).json();
    let sums = (&json["verdict"], &json["vms"], &json["resets"], &json["names"]["fpu-kept"]);
    assert_eq!(sums, (&"findings".into(), &4.into(), &24.into(), &24.into()), "{json}");

    // A shard that was ended before its time.
    let lines = fs::read_to_string(second).unwrap();
    let cut = file(&dir, "cut", &lines.as_bytes()[..lines.len() - 10]);
    run(&["merge", first, cut.to_str().unwrap()])
        .expect_status(130)
        .expect_stdout("interrupted: machines 3 to 4 of seed 7 on ")
        .expect_stdout("ends without a verdict");
    let json = run(&["merge", "--json", first, cut.to_str().unwrap()]).expect_status(130).json();
    assert_eq!((&json["verdict"], &json["ending"]), (&Value::Null, &"interrupted".into()));

    let check = |arguments: &[&str], message: &str| {
        let outcome = run(&[&["merge"], arguments].concat()).expect_status(2);
        let outcome = outcome.expect_stderr(message).expect_one_line_of_stderr();
        assert!(outcome.stdout.is_empty(), "{outcome}");
    };
    check(&[], "FILE");
    check(&["/no/such/file"], "read \"/no/such/file\": No such file");
    check(&[dir.path().to_str().unwrap()], "Is a directory");
    check(&[first, first], "machine 1 of seed 7 is in");
    check(&["/dev/null"], "has no line of `soak --json`");
    check(&[first, "--junit", &path("same"), "--html", &path("same")], "name the same file");
    assert!(!dir.path().join("same").exists());
}
