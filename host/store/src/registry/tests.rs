//! Versions never change, traffic moves, and nothing outside the names' form reaches a path.

use std::time::{Duration, SystemTime};

use galerne_core::deployment::Deployment;
use galerne_core::guest::{GuestFacts, World};
use serde_json::json;

use super::*;

fn registry() -> (tempfile::TempDir, Registry) {
    let folder = tempfile::tempdir().expect("folder");
    let registry = Registry::new(folder.path());
    (folder, registry)
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn facts() -> GuestFacts {
    GuestFacts {
        worlds: vec![World::Filter],
        imports: Vec::new(),
    }
}

fn deployment(name: &str) -> Deployment {
    let value = json!({"name": name, "model": "m", "filters": [{"plugin": "f", "params": {"kinds": ["email"]}}],
        "defaults": {"temperature": 0.5}});
    serde_json::from_value(value).expect("a deployment")
}

#[test]
fn a_pushed_version_never_changes() {
    let (_folder, registry) = registry();
    let push = |version, component: &[u8]| registry.push("t", "f", version, &facts(), component, now());
    let first = push("0.1.0", b"one").expect("pushed");
    assert_eq!(push("0.1.0", b"one").expect("the same again"), first);
    let error = push("0.1.0", b"two").expect_err("another component");
    assert!(matches!(error, RegistryError::VersionTaken { .. }), "{error}");
    push("0.10.0", b"ten").expect("pushed");
    push("0.2.0", b"two").expect("pushed");
    let versions = registry.plugin_versions("t", "f").expect("listed");
    let numbers: Vec<&str> = versions.iter().map(|record| record.version.as_str()).collect();
    assert_eq!(
        numbers,
        ["0.1.0", "0.2.0", "0.10.0"],
        "in the order of versions, not of text"
    );
    assert_eq!(registry.component(&first.digest).expect("kept"), b"one");
}

#[test]
fn tenants_do_not_see_each_other() {
    let (_folder, registry) = registry();
    registry
        .push("a", "f", "0.1.0", &facts(), b"one", now())
        .expect("pushed");
    assert!(registry.plugins("b").expect("listed").is_empty());
    assert!(registry.plugin_versions("b", "f").expect("listed").is_empty());
    assert_eq!(registry.tenants().expect("listed"), ["a"]);
}

#[test]
fn paths_cannot_be_left() {
    let (_folder, registry) = registry();
    for name in ["..", "../x", "", "A", "a/b", "a\0"] {
        assert!(registry.plugins(name).is_err(), "tenant {name:?}");
        assert!(registry.plugin_versions("t", name).is_err(), "plugin {name:?}");
        assert!(registry.deployment("t", name).is_err(), "deployment {name:?}");
        let pushed = registry.push("t", "f", name, &facts(), b"x", now());
        assert!(pushed.is_err(), "version {name:?}");
    }
}

#[test]
fn a_changed_component_is_not_handed_out() {
    let (folder, registry) = registry();
    let digest = registry.keep(b"honest").expect("kept");
    let file = std::fs::read_dir(folder.path().join("components"))
        .expect("listed")
        .next();
    let file = file.expect("one file").expect("readable").path();
    std::fs::write(file, b"forged").expect("written");
    let error = registry.component(&digest).expect_err("forged");
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn deployments_count_their_versions_and_read_back_as_written() {
    let (folder, registry) = registry();
    let first = registry.publish("t", &deployment("d"), now()).expect("published");
    let second = registry.publish("t", &deployment("d"), now()).expect("published");
    assert_eq!((first.version, second.version), (1, 2));
    assert!(
        registry.deployments("t").expect("listed").is_empty(),
        "no traffic yet"
    );
    let go = |traffic: Option<Traffic>| {
        assert_eq!(traffic, None);
        Ok::<_, RegistryError>(Traffic {
            stable: 2,
            history: vec![1],
            canary: Some(Canary {
                version: 1,
                percent: 5,
            }),
        })
    };
    let traffic = registry.route("t", "d", go).expect("routed");
    let again = Registry::new(folder.path());
    let record = again.deployment("t", "d").expect("there");
    assert_eq!((record.traffic, record.versions), (traffic, vec![1, 2]));
    assert_eq!(again.published("t", "d", 1).expect("there"), first);
    let error = again.published("t", "d", 3).expect_err("no third");
    assert_eq!(
        error.to_string(),
        "deployment \"d\" has no version 3; it has [1, 2]"
    );
    assert!(again.deployment("t", "other").is_err());
}
