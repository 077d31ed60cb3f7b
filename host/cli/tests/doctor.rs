//! `galerne doctor --measure`: every figure that a reader of the JSON relies on is there.

use std::process::Command;

use serde_json::Value;

#[test]
fn measured_limits_are_there_for_one_and_all_threads() {
    let output = Command::new(env!("CARGO_BIN_EXE_galerne"))
        .args(["doctor", "--measure", "--json"])
        .output()
        .expect("run galerne doctor");
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let measured: Value = serde_json::from_str(&text).expect(&text);
    let threads = measured["threads"].as_u64().expect("a number of threads");
    let figures = |list: &str, value: &str| -> Vec<(u64, f64)> {
        let list = measured[list].as_array().expect("a list");
        let figure = |entry: &Value| Some((entry["threads"].as_u64()?, entry[value].as_f64()?));
        list.iter()
            .map(|entry| figure(entry).expect("a figure"))
            .collect()
    };
    let all = [figures("read", "gb_per_s"), figures("arithmetic", "gop_per_s")];
    for figures in &all {
        for wanted in [1, threads] {
            assert!(figures.iter().any(|(threads, _)| *threads == wanted), "{text}");
        }
        assert!(figures.iter().all(|(_, value)| *value > 0.1), "{text}");
    }
    let sizes = measured["read"].as_array().expect("a list");
    let sizes: std::collections::BTreeSet<_> =
        sizes.iter().map(|read| read["buffer_bytes"].as_u64()).collect();
    assert_eq!(sizes.len(), 2, "{text}");
}
