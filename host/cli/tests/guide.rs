//! The guide in `docs/` keeps its promises: its deployments are deployments, its links lead somewhere, its chapters are listed.

use std::path::{Path, PathBuf};

use galerne_core::deployment::Deployment;

fn chapters() -> Vec<(PathBuf, String)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src");
    let entries = std::fs::read_dir(folder).expect("the guide is part of the repository");
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let path = entry.expect("readable").path();
        let text = std::fs::read_to_string(&path).expect("readable");
        (path, text)
    };
    entries.map(read).collect()
}

/// What stands between fences that begin with "```toml".
fn toml_blocks(text: &str) -> impl Iterator<Item = &str> {
    text.split("```toml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
}

#[test]
fn deployments_in_the_guide_are_deployments() {
    let mut checked = 0;
    for (path, text) in chapters() {
        for block in toml_blocks(&text).filter(|block| block.starts_with("name")) {
            let deployment: Deployment =
                toml::from_str(block).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            deployment
                .check()
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            checked += 1;
        }
    }
    assert!(checked >= 4, "only {checked} deployments were found");
}

#[test]
fn links_lead_to_files_and_every_chapter_is_listed() {
    let chapters = chapters();
    let summary = chapters.iter().find(|(path, _)| path.ends_with("SUMMARY.md"));
    let (_, summary) = summary.expect("the guide has a summary");
    for (path, text) in &chapters {
        let name = path.file_name().expect("a file").to_string_lossy();
        assert!(
            name == "SUMMARY.md" || summary.contains(&format!("({name})")),
            "{name} is not listed"
        );
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let target = path.parent().expect("a folder").join(link);
            assert!(
                link.contains("://") || target.exists(),
                "{name}: {link} leads nowhere"
            );
        }
    }
}
