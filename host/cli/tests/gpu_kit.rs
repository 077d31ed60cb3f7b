//! The script of the kit for machines with a GPU, tried where there is none: the CPU is checked instead, at sizes that take
//! seconds.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

fn kit(galerne: &Path, out: &Path, args: &[&str]) -> Option<Output> {
    let python = std::env::var("GALERNE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../benches/gpu/run.py");
    let mut command = Command::new(python);
    command.arg("-B").arg(script).arg("--galerne").arg(galerne);
    command
        .args(["--device", "cpu", "--quick", "--out"])
        .arg(out)
        .args(args);
    match command.output() {
        Ok(output) => Some(output),
        Err(error) => {
            eprintln!("skipped: no Python: {error}");
            None
        }
    }
}

fn sections(out: &Path) -> Vec<Value> {
    let report = std::fs::read_to_string(out.join("report.json")).expect("the report is there");
    let report: Value = serde_json::from_str(&report).expect("the report is JSON");
    report["sections"].as_array().expect("sections").clone()
}

#[test]
fn every_section_runs_or_says_why_not() {
    let out = tempfile::tempdir().expect("a folder");
    let binary = Path::new(env!("CARGO_BIN_EXE_galerne"));
    let Some(output) = kit(binary, out.path(), &["--minutes", "8"]) else {
        return;
    };
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let sections = sections(out.path());
    assert_eq!(sections.len(), 22);
    for section in &sections {
        let (name, ended) = (section["name"].as_str().expect("a name"), &section["ended"]);
        let figures = section["figures"].as_array().expect("figures");
        let is_ours = ["info", "conformance", "tokens", "decode"]
            .iter()
            .any(|ours| name.starts_with(ours));
        if is_ours {
            assert_eq!(ended, "ran", "{section}");
            assert!(!figures.is_empty(), "{section}");
            for figure in figures {
                assert_ne!(figure["passed"], false, "{figure}");
                assert!(
                    figure["value"].is_null() || figure["value"].as_f64() > Some(0.0),
                    "{figure}"
                );
            }
        } else if ended != "ran" {
            // The other programs may be missing here; then that is what the report says.
            let said = section["said"].as_str().unwrap_or_default();
            let reasons = [
                "is not on this machine",
                "this kit has no tests of kernels",
                "No module named",
                "no NVIDIA driver is installed",
            ];
            assert!(reasons.iter().any(|why| said.contains(why)), "{section}");
        }
    }
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    let markdown = std::fs::read_to_string(out.path().join("report.md")).expect("the table is there");
    for text in [table, markdown] {
        assert!(text.contains("decode Tiny bf16 x 2 at 64"), "{text}");
        assert!(text.contains("decode Tiny fp8, KV in fp8 x 2 at 64"), "{text}");
        assert!(text.contains("passed"), "{text}");
    }
}

fn program(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("executable");
}

#[test]
fn what_tests_of_kernels_say_are_figures() {
    let out = tempfile::tempdir().expect("a folder");
    let text =
        "#!/bin/sh\necho 'test one ... ok'\necho 'test two ... FAILED'\necho $GALERNE_TEST_CUDA\nexit 101\n";
    program(&out.path().join("cuda_norm"), text);
    let folder = out.path().to_str().expect("UTF-8");
    let args = ["--only", "float64", "--tests", folder];
    if kit(Path::new("galerne"), out.path(), &args).is_none() {
        return;
    }
    let sections = sections(out.path());
    assert_eq!(sections.len(), 1);
    assert_eq!(sections[0]["name"], "float64 norm");
    assert_eq!(sections[0]["ended"], "failed");
    let figures = sections[0]["figures"].as_array().expect("figures");
    let figures: Vec<_> = figures.iter().map(|f| (&f["name"], &f["passed"])).collect();
    assert_eq!(
        figures,
        [(&"one".into(), &true.into()), (&"two".into(), &false.into())]
    );
    let said = sections[0]["said"].as_str().expect("a text");
    assert!(said.contains(&format!("{folder}/kernels.bin")), "{said}");
}

#[test]
fn what_hangs_is_ended_and_recorded() {
    let out = tempfile::tempdir().expect("a folder");
    let binary = out.path().join("hangs");
    let text = "#!/bin/sh\necho '{\"name\": \"before\", \"value\": 1}'\nsleep 600\n";
    program(&binary, text);
    let begin = Instant::now();
    if kit(
        &binary,
        out.path(),
        &["--minutes", "0.1", "--only", "conformance"],
    )
    .is_none()
    {
        return;
    }
    assert!(begin.elapsed() < Duration::from_secs(60), "{:?}", begin.elapsed());
    let sections = sections(out.path());
    assert_eq!(sections.len(), 3);
    assert_eq!(sections[0]["ended"], "failed");
    assert_eq!(sections[0]["figures"][0]["name"], "before");
    assert!(
        sections[0]["said"]
            .as_str()
            .is_some_and(|said| said.contains("not done after"))
    );
    for section in &sections[1..] {
        assert_eq!(section["ended"], "skipped", "{section}");
    }
}
