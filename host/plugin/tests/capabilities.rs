//! What guests may do outside themselves: what is granted works, and whoever asks for more is refused in bounded time.

mod guests;

use std::io::Write as _;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use galerne_core::filter::Channel;
use galerne_core::guest::{GuestLoader as _, GuestSource};
use galerne_core::limits::{CapabilityLimits, KvLimits};
use galerne_core::tool::ToolError;
use guests::capability::{Deployment, Names, Overreach, SECRET, reply, serve};
use guests::expect::{is_limit, is_link, serves};
use guests::filter::{Filter, info};
use guests::{built, host};

fn has(text: &str, words: &str) {
    assert!(text.contains(words), "expected \"{words}\" in \"{text}\"");
}

/// Runs it, and asserts that it took less than two seconds.
fn soon<T>(run: impl FnOnce() -> T) -> T {
    let started = Instant::now();
    let result = run();
    let took = started.elapsed();
    assert!(took < Duration::from_secs(2), "contained only after {took:?}");
    result
}

fn http(port: u16) -> Vec<String> {
    ["local.test", "other.test", "*.evil.test"]
        .map(|name| format!("http://{name}:{port}"))
        .to_vec()
}

#[test]
fn what_is_not_granted_cannot_be_imported() {
    let Some(component) = built("overreach") else {
        return;
    };
    for (grants, words) in [
        (
            "{}",
            &[
                "log = true",
                "http = [\"HOST\"]",
                "kv = true",
                "secrets = [\"NAME\"]",
            ][..],
        ),
        (
            r#"{"log": true, "http": ["a.example"], "kv": true}"#,
            &["\"galerne:secrets/vault@0.1.0\" is not granted"],
        ),
    ] {
        let deployment = Deployment {
            grants: grants.to_owned(),
            ..Deployment::default()
        };
        let error = deployment
            .host()
            .0
            .load_tool("evil", &component)
            .err()
            .expect("not granted");
        is_link(&error, words);
        is_link(&error, &["in the table [capabilities] of the deployment"]);
    }
    let error = host()
        .load_tool("evil", &component)
        .err()
        .expect("nothing is granted");
    is_link(&error, &["is not granted"]);
    let facts = host().inspect(GuestSource {
        tenant: "acme",
        name: "evil",
        component: &component,
    });
    assert_eq!(facts.expect("it fits some deployment").imports.len(), 4);
}

#[test]
fn log_lines_are_kept_and_cannot_be_forged() {
    let Some(mut evil) = Deployment::of_overreach(&http(1)).overreach() else {
        return;
    };
    evil.ask("log", "one\nERROR two\u{1b}[2J", 1)
        .expect("it is written");
    let lines = evil.log.after(0).lines;
    assert_eq!(lines.len(), 1);
    assert_eq!(
        (lines[0].guest.as_str(), lines[0].request.as_str()),
        ("evil", info().id.as_str())
    );
    assert_eq!(lines[0].text, "one\\nERROR two\\u{1b}[2J");
}

#[test]
fn a_terabyte_of_logs() {
    let Some(mut evil) = Deployment::of_overreach(&http(1)).overreach() else {
        return;
    };
    match soon(|| evil.ask("log", &"x".repeat(1_000), 1_000_000_000)) {
        Err(ToolError::Guest(error)) => is_limit(&error, "log lines of at most 262144 bytes per request"),
        other => panic!("expected a limit, got {other:?}"),
    }
    let kept = evil.log.after(0).lines;
    assert!(
        (100..=200).contains(&kept.len()),
        "{} lines: at most 100 in a second",
        kept.len()
    );
    serves(&evil.host);
}

#[test]
fn granted_secrets_are_given_and_no_others() {
    let Some(mut evil) = Deployment::of_overreach(&http(1)).overreach() else {
        return;
    };
    assert_eq!(evil.ask("secret", "CRM_TOKEN", 1), Ok(SECRET.to_owned()));
    for name in ["ROOT_TOKEN", "../CRM_TOKEN", "crm_token", "", "CRM_TOKEN\n"] {
        let reason = evil.refused("secret", name, 1);
        has(&reason, "not granted");
        assert!(!reason.contains(SECRET), "{reason}");
    }
    has(&evil.refused("secret", "LOST", 1), "there is none");
}

#[test]
fn values_are_kept_within_quotas() {
    let deployment = Deployment {
        limits: CapabilityLimits {
            kv: KvLimits {
                keys_max: 10,
                tenant_bytes_max: 100,
                key_bytes_max: 50,
                ..KvLimits::default()
            },
            ..CapabilityLimits::default()
        },
        ..Deployment::of_overreach(&http(1))
    };
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    assert_eq!(evil.ask("kv-get", "a0", 1), Ok("nothing".to_owned()));
    evil.ask("kv-set", "a", 3).expect("room for three");
    assert_eq!(evil.ask("kv-get", "a0", 1), Ok("value".to_owned()));
    assert_eq!(evil.ask("kv-keys", "a", 1), Ok("a0 a1 a2".to_owned()));
    evil.ask("kv-delete", "a1", 1).expect("it is there");
    assert_eq!(evil.ask("kv-keys", "", 1), Ok("a0 a2".to_owned()));
    has(
        &evil.refused("kv-set", "b", 1_000_000),
        "after 8: kv: the tenant has 10 keys of at most 10 (kv_keys_max, the host's operator can raise it)",
    );
    evil.ask("kv-set", "b", 8)
        .expect("keys that are there may be set again");
    has(
        &evil.refused("kv-set", "a-key-that-is-rather-long-in-bytes-for-this", 1),
        "keys of at most",
    );
    evil.ask("kv-delete", "b0", 1).expect("it is there");
    has(
        &evil.refused("kv-set", "a-key-that-is-rather-long-in-bytes-for-this", 1),
        "bytes of at most 100",
    );
    has(
        &evil.refused("kv-set-large", "c", 1),
        "a value of at most 262144 bytes",
    );
    has(
        &evil.refused("kv-set", &"k".repeat(60), 1),
        "a key of 1 to 50 bytes",
    );
}

#[test]
fn granted_servers_are_called_and_no_others() {
    let port = serve(|head, stream| reply(stream, 200, "", head.lines().next().unwrap_or_default()));
    let deployment = Deployment::of_overreach(&http(port));
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    let answer = evil.ask("get", &format!("http://local.test:{port}/x?y=z"), 1);
    assert_eq!(answer, Ok("200 GET /x?y=z HTTP/1.1".to_owned()));
    let answer = evil.ask("post", &format!("http://LOCAL.test:{port}/"), 1);
    assert_eq!(answer, Ok("200 POST / HTTP/1.1".to_owned()));
    for url in [
        format!("http://elsewhere.test:{port}/"),
        format!("https://local.test:{port}/"),
        format!("http://127.0.0.1:{port}/"),
        format!("http://[::ffff:127.0.0.1]:{port}/"),
        format!("http://2130706433:{port}/"),
        "http://169.254.169.254/latest/meta-data/".to_owned(),
        "http://local.test/".to_owned(),
    ] {
        let asked = deployment.names.asked.load(Ordering::SeqCst);
        has(&evil.refused("get", &url, 1), "is not granted; to grant it");
        let asked_now = deployment.names.asked.load(Ordering::SeqCst);
        assert_eq!(
            asked_now, asked,
            "{url}: the name of what is not granted is not even looked up"
        );
    }
    for url in [
        format!("http://local.test@elsewhere.test:{port}/"),
        "local.test".to_owned(),
    ] {
        has(&evil.refused("get", &url, 1), "expected https://HOST/PATH");
    }
}

#[test]
fn private_addresses_behind_granted_names() {
    let names = [
        ("loop", &["127.0.0.1"][..]),
        ("metadata", &["169.254.169.254"]),
        ("mapped", &["::ffff:169.254.169.254"]),
        ("unique", &["fd00:ec2::254"]),
        ("one-of-two", &["1.1.1.1", "10.0.0.1"]),
    ];
    let mut lies = Names::default();
    for (name, addresses) in names {
        lies = lies.with(&format!("{name}.evil.test"), &[addresses]);
    }
    let deployment = Deployment {
        names: Arc::new(lies),
        local: false,
        ..Deployment::of_overreach(&http(80))
    };
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    for (name, addresses) in names {
        let reason = soon(|| evil.refused("get", &format!("http://{name}.evil.test/"), 1));
        has(&reason, "a network that guests may not reach");
        assert!(
            !reason.contains(addresses[0]),
            "it tells what is inside: {reason}"
        );
    }
}

#[test]
fn a_name_that_changes_its_address_between_check_and_connection() {
    let port = serve(|_, stream| reply(stream, 200, "", "hello"));
    let names = Names::default().with("rebinding.evil.test", &[&["127.0.0.1"], &["10.0.0.1"]]);
    let deployment = Deployment {
        names: Arc::new(names),
        ..Deployment::of_overreach(&http(port))
    };
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    let url = format!("http://rebinding.evil.test:{port}/");
    assert_eq!(evil.ask("get", &url, 1), Ok("200 hello".to_owned()));
    let asked = deployment.names.asked.load(Ordering::SeqCst);
    assert_eq!(
        asked, 1,
        "it connects to the address that was checked and asks no second time"
    );
    has(
        &evil.refused("get", &url, 1),
        "a network that guests may not reach",
    );
}

#[test]
fn redirects_are_checked_like_calls() {
    let port = serve(|head, stream| {
        let path = head.split(' ').nth(1).unwrap_or_default();
        let location = match path {
            "/metadata" => "http://169.254.169.254/latest/meta-data/".to_owned(),
            "/private" => format!(
                "http://private.evil.test:{}/",
                stream.local_addr().expect("bound").port()
            ),
            "/other" => format!(
                "http://other.test:{}/echo",
                stream.local_addr().expect("bound").port()
            ),
            "/same" => "/echo".to_owned(),
            "/circle" => "/circle".to_owned(),
            "/file" => "file:///etc/passwd".to_owned(),
            _ => return reply(stream, 200, "", head),
        };
        reply(stream, 302, &format!("location: {location}\r\n"), "");
    });
    let deployment = Deployment {
        names: Arc::new(Names::local().with("private.evil.test", &[&["10.0.0.1"]])),
        ..Deployment::of_overreach(&http(port))
    };
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    let url = |path: &str| format!("http://local.test:{port}{path}");
    has(
        &evil.refused("get", &url("/metadata"), 1),
        "http://169.254.169.254:80 is not granted",
    );
    has(
        &evil.refused("get", &url("/private"), 1),
        "a network that guests may not reach",
    );
    has(&evil.refused("get", &url("/circle"), 1), "at most 4 redirects");
    has(&evil.refused("get", &url("/file"), 1), "Invalid");
    let same = evil
        .ask("get", &url("/same"), 1)
        .expect("the same host")
        .to_lowercase();
    has(&same, "authorization: bearer token");
    let other = evil
        .ask("get", &url("/other"), 1)
        .expect("a granted host")
        .to_lowercase();
    has(&other, "accept: text/plain");
    assert!(
        !other.contains("bearer"),
        "the token went to another host: {other}"
    );
    has(
        &evil.ask("post", &url("/same"), 1).expect("as browsers do"),
        "GET /echo",
    );
}

#[test]
fn servers_that_take_their_time() {
    let port = serve(|head, stream| {
        if head.starts_with("GET /silent") {
            std::thread::sleep(Duration::from_secs(20));
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n");
        // A byte often enough that no single read runs late.
        while stream.write_all(b"x").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let Some(mut evil) = Deployment::of_overreach(&http(port)).overreach() else {
        return;
    };
    for path in ["silent", "drip"] {
        // The call waits longer than its own deadline of 200 ms, and lives to tell.
        let reason = soon(|| evil.refused("get", &format!("http://local.test:{port}/{path}"), 1));
        has(&reason, "Timeout");
    }
    serves(&evil.host);
    let slow = Deployment {
        names: Arc::new(Names {
            delay: Duration::from_secs(20),
            ..Names::local()
        }),
        ..Deployment::of_overreach(&http(port))
    };
    let mut evil = slow.overreach().expect("it is built");
    has(
        &soon(|| evil.refused("get", &format!("http://local.test:{port}/"), 1)),
        "Timeout",
    );
}

#[test]
fn too_much_of_everything() {
    let port = serve(|head, stream| match head.split(' ').nth(1) {
        Some("/endless") => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n");
            while stream.write_all(&[b'x'; 64 << 10]).is_ok() {}
        }
        Some("/headers") => {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n");
            while stream
                .write_all(b"x-more: and more and more and more\r\n")
                .is_ok()
            {}
        }
        _ => reply(stream, 200, "", "ok"),
    });
    let limits = CapabilityLimits {
        http_calls_max: 10,
        http_request_bytes_max: 100_000,
        http_response_bytes_max: 1 << 20,
        ..CapabilityLimits::default()
    };
    let deployment = Deployment {
        limits,
        ..Deployment::of_overreach(&http(port))
    };
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    let url = |path: &str| format!("http://local.test:{port}{path}");
    let reason = soon(|| evil.refused("get", &url("/endless"), 1));
    has(
        &reason,
        "a body of at most 1048576 bytes (http_response_bytes_max",
    );
    has(&soon(|| evil.refused("get", &url("/headers"), 1)), "Failed");
    has(
        &evil.refused("post", &url("/#large"), 1),
        "a request of at most 100000 bytes (http_request_bytes_max",
    );
    let reason = soon(|| evil.refused("get", &url("/"), 1_000_000));
    has(
        &reason,
        "after 7: Error::Limit(\"http: at most 10 calls of a guest per request (http_calls_max",
    );
    serves(&evil.host);
}

#[test]
fn a_guest_that_waits_does_not_hold_up_others() {
    let (arrived, is_waiting) = mpsc::sync_channel(1);
    let (let_go, go_on) = mpsc::channel::<()>();
    let go_on = Mutex::new(go_on);
    let port = serve(move |_, stream| {
        arrived.send(()).expect("the test waits");
        let waited = go_on
            .lock()
            .expect("one call")
            .recv_timeout(Duration::from_secs(20));
        reply(stream, 200, "", if waited.is_ok() { "late" } else { "too late" });
    });
    let mut deployment = Deployment::of_overreach(&http(port));
    deployment.limits.http_time_max = Duration::from_secs(20);
    deployment.wait_max = Duration::from_secs(20);
    let Some(mut slow) = deployment.overreach() else {
        return;
    };
    let mut quick = Overreach::of(slow.host.clone(), Arc::clone(&slow.log)).expect("it is built");
    let url = format!("http://local.test:{port}/");
    let calling = std::thread::spawn(move || slow.ask("get", &url, 1));
    is_waiting
        .recv_timeout(Duration::from_secs(20))
        .expect("the slow guest's call");
    assert_eq!(quick.ask("kv-set", "a", 20), Ok("done".to_owned()));
    assert_eq!(quick.ask("secret", "CRM_TOKEN", 1), Ok(SECRET.to_owned()));
    // Much longer than the call's own deadline of 200 ms, and than a cell may be silent.
    std::thread::sleep(Duration::from_millis(2_500));
    assert_eq!(quick.ask("kv-get", "a0", 1), Ok("value".to_owned()));
    let_go.send(()).expect("the server waits");
    assert_eq!(calling.join().expect("no panic"), Ok("200 late".to_owned()));
}

#[test]
fn what_a_request_uses_is_counted_from_call_to_call() {
    let port = serve(|_, stream| reply(stream, 200, "", "ok"));
    let mut deployment = Deployment::of_overreach(&http(port));
    deployment.limits.http_calls_max = 2;
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    let url = format!("http://local.test:{port}/");
    for _ in 0..2 {
        assert_eq!(evil.ask("get", &url, 1), Ok("200 ok".to_owned()));
    }
    has(&evil.refused("get", &url, 1), "at most 2 calls");
}

#[test]
fn a_limit_that_a_deployment_lowered_is_told_as_its_own() {
    let port = serve(|_, stream| reply(stream, 200, "", "ok"));
    let deployment = Deployment {
        lower: &[
            ("http_calls_max", 1),
            ("http_redirects_max", 1_000),
            ("kv_value_bytes_max", 3),
            ("log_request_bytes_max", 10),
            ("tool_answer_bytes_max", 6),
        ],
        ..Deployment::of_overreach(&http(port))
    };
    let own = |name: &str, host: u64| {
        format!("(limits.{name} of deployment \"support\", which can raise it to the host's {host})")
    };
    let Some(mut evil) = deployment.overreach() else {
        return;
    };
    let url = format!("http://local.test:{port}/");
    assert_eq!(evil.ask("get", &url, 1), Ok("200 ok".to_owned()));
    let reason = evil.refused("get", &url, 1).replace('\\', "");
    has(&reason, "at most 1 calls");
    has(&reason, &own("http_calls_max", 16));
    let reason = evil.refused("kv-set", "a", 1).replace('\\', "");
    has(&reason, &own("kv_value_bytes_max", 256 << 10));
    evil.ask("kv-delete", "a", 1).expect("short");
    // These end the request.
    let error = evil.ask("kv-get", "nobody", 1).expect_err("7 bytes of answer");
    has(&error.to_string(), &own("tool_answer_bytes_max", 256 << 10));
    let error = evil.ask("log", "a line of more", 1).expect_err("14 bytes");
    has(&error.to_string(), &own("log_request_bytes_max", 256 << 10));
}

#[test]
fn filters_log_too() {
    let component = Filter {
        on_text: "(call $log (i32.const 1) (local.get 3) (local.get 4))
            (call $passage (local.get 3) (local.get 4) (local.get 4))",
        ..Filter::default()
    }
    .logging_component();
    let load = |grants: &str| {
        let deployment = Deployment {
            grants: grants.to_owned(),
            ..Deployment::default()
        };
        let (host, log) = deployment.host();
        (host.load_filter("evil", &component), log)
    };
    let (guest, log) = load(r#"{"log": true}"#);
    let mut session = guest.expect("it fits").session("{}", &info()).expect("a session");
    for text in ["one", "two"] {
        assert_eq!(session.on_text(Channel::Content, text), Ok(text.to_owned()));
    }
    let lines: Vec<String> = log.after(0).lines.into_iter().map(|line| line.text).collect();
    assert_eq!(lines, ["one", "two"]);
    let error = load(r#"{"kv": true}"#).0.err().expect("not granted");
    is_link(&error, &["\"galerne:log/logging@0.1.0\" is not granted"]);
}

#[test]
fn http_get_reads_a_page_of_a_granted_server() {
    let Some(component) = built("http-get") else {
        return;
    };
    let port = serve(|head, stream| {
        let found =
            head.starts_with("GET /wiki/galerne ") && head.to_lowercase().contains("accept: text/plain");
        match found {
            true => reply(stream, 200, "content-type: text/plain\r\n", "A west wind.\n"),
            false => reply(stream, 404, "", "no such page"),
        }
    });
    let deployment = Deployment {
        grants: format!(r#"{{"http": ["http://local.test:{port}"]}}"#),
        ..Deployment::default()
    };
    let guest = deployment
        .host()
        .0
        .load_tool("http-get", &component)
        .expect("it fits");
    let params = r#"{"headers": {"accept": "text/plain"}, "max_bytes": 8}"#;
    assert_eq!(guest.list(params).expect("lists")[0].name, "http_get");
    let mut session = guest.session(params, &info()).expect("a session");
    let mut get = |url: String| session.call("http_get", &format!(r#"{{"url": "{url}"}}"#));
    let page = get(format!("http://local.test:{port}/wiki/galerne"));
    assert_eq!(page, Ok("A west w\n[cut: 8 of 12 bytes]".to_owned()));
    let missing = get(format!("http://local.test:{port}/wiki/none"));
    assert_eq!(
        missing,
        Ok("status 404\nno such \n[cut: 8 of 12 bytes]".to_owned())
    );
    let denied = get("https://example.com/".to_owned());
    assert!(matches!(denied, Err(ToolError::Failed(reason)) if reason.contains("is not granted")));
    let nonsense = get("wiki".to_owned());
    assert!(matches!(nonsense, Err(ToolError::Arguments(_))), "{nonsense:?}");
}
