//! An author at the command line, and a client's chat requests. Knows no test.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::h3::h3;
use super::{Host, data, root};

/// A data folder of this test's own, with the demo model in it.
pub(crate) struct Author {
    folder: tempfile::TempDir,
}

impl Author {
    pub(crate) fn new() -> Option<Self> {
        let models = data()?.join("models");
        let folder = tempfile::tempdir().expect("folder");
        std::os::unix::fs::symlink(models, folder.path().join("models")).expect("link the models");
        Some(Self { folder })
    }

    pub(crate) fn data(&self) -> &Path {
        self.folder.path()
    }

    /// Runs `galerne` with these arguments against the host: whether it succeeded, and what it said.
    pub(crate) fn galerne(&self, host: &Host, args: &[&str]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_galerne"))
            .args(args)
            .args(["--server", &host.https, "--data"])
            .arg(self.data())
            .output()
            .expect("run galerne");
        let said = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&said).into_owned(),
        )
    }

    pub(crate) fn does(&self, host: &Host, args: &[&str]) -> String {
        let (done, said) = self.galerne(host, args);
        assert!(done, "{args:?}: {said}");
        said
    }

    pub(crate) fn deployment(&self, toml: &str) -> String {
        let file = self.data().join("deployment.toml");
        std::fs::write(&file, toml).expect("write");
        file.display().to_string()
    }

    pub(crate) fn deploy(&self, host: &Host, toml: &str, more: &[&str]) -> String {
        let file = self.deployment(toml);
        self.does(host, &[&["deploy", &file], more].concat())
    }

    pub(crate) fn refused(&self, host: &Host, toml: &str) -> String {
        let file = self.deployment(toml);
        let (done, said) = self.galerne(host, &["deploy", &file]);
        assert!(!done, "{said}");
        said
    }
}

pub(crate) fn guest(name: &str) -> PathBuf {
    let file = root().join("target/guests").join(name).with_extension("wasm");
    assert!(file.exists(), "cargo xtask guests builds {}", file.display());
    file
}

/// A chat completion over HTTP/3.
pub(crate) fn ask(host: &Host, model: &str, content: &str, extra: &Value) -> (u16, Value) {
    let mut body =
        json!({"model": model, "temperature": 0, "messages": [{"role": "user", "content": content}]});
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
    let (status, text) = h3(host, "POST", "/v1/chat/completions", &body.to_string());
    (
        status,
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}")),
    )
}

pub(crate) fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .unwrap_or_else(|| panic!("{answer}"))
}
