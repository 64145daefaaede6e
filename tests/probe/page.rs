//! `--html`: what a reader sees of the page.

use std::fs;

use crate::harness::browser::{self, Seen};
use crate::harness::{run, temp_dir};

#[test]
fn the_page_shows_its_figures_in_a_browser() {
    let dir = temp_dir();
    let file = dir.path().join("probe.html");
    let options = ["--count", "300", "--html", file.to_str().unwrap()];
    let arguments = ["probe", "--mib", "1", "--connections", "32"];
    run(&[&arguments[..], &options].concat()).expect_status(0);
    for width in [1100, 600] {
        let Some(Seen { title, dom }) = browser::look(&file, width) else { return };
        let plots: Vec<_> =
            title["shown"].as_array().unwrap().iter().map(|p| p.as_str().unwrap()).collect();
        // Inside of its frame; bars, marks, lines; labelled.
        for (plot, bytes) in plots.iter().zip([1, 64, 1024, 4096, 16384, 65536]) {
            let rest = plot
                .strip_prefix(&format!("trips-{bytes} true "))
                .unwrap_or_else(|| panic!("{title}"));
            let bars: u32 = rest.split(' ').next().unwrap().parse().unwrap();
            assert!(bars > 3 && rest.ends_with(" 0 0 true"), "{title}");
        }
        assert_eq!(plots[6..], ["throughput true 0 9 3 true", "connections true 0 3 1 true"]);
        assert_eq!(title["wide"], false, "{title}");
        assert!(dom.contains("pass: 31 of 31 checks passed"), "{dom}");
        assert!(dom.contains("guest-opened/vanished-client"), "{dom}");
        assert!(dom.contains("id=\"audit\">DMA audit: "), "{dom}");
    }
}

#[test]
fn a_page_that_cannot_be_written_is_refused_before() {
    let outcome = run(&["probe", "--html", "/no/such/page"]).expect_status(2);
    let outcome = outcome.expect_stderr("write \"/no/such/page\"").expect_one_line_of_stderr();
    assert!(outcome.stdout.is_empty(), "{outcome}");
}

#[test]
fn a_refused_probe_leaves_the_page_as_it_is() {
    let dir = temp_dir();
    let (old, new) = (dir.path().join("old"), dir.path().join("new"));
    fs::write(&old, "of yesterday").unwrap();
    for page in [&old, &new] {
        let options = ["probe", "--uds", "/no/such/socket", "--html", page.to_str().unwrap()];
        run(&options).expect_status(2).expect_one_line_of_stderr();
    }
    assert_eq!(fs::read_to_string(&old).unwrap(), "of yesterday");
    assert!(!new.exists());
}
