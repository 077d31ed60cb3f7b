//! Whole requests and answers, in pieces of any length.

use galerne_sdk::filter::ToolCall;
use galerne_sdk::json::json;
use proptest::prelude::*;

use super::*;

fn session(params: &Value) -> Result<PiiRedact, String> {
    let info = RequestInfo {
        params_json: String::new(),
        id: "1".to_owned(),
        model: "m".to_owned(),
    };
    PiiRedact::create(params, &info)
}

fn message(content: &str, arguments: &[&str]) -> Message {
    let call = |arguments: &&str| ToolCall {
        id: "1".to_owned(),
        name: "send".to_owned(),
        arguments_json: (*arguments).to_owned(),
    };
    Message {
        role: "user".to_owned(),
        content: content.to_owned(),
        tool_calls: arguments.iter().map(call).collect(),
        tool_call_id: None,
    }
}

/// The messages as they go on.
fn sent(session: &mut PiiRedact, messages: Vec<Message>) -> Vec<Message> {
    let request = Request {
        messages: messages.clone(),
        tools: vec![],
    };
    match session.on_request(request) {
        Verdict::Pass => messages,
        Verdict::Rewrite(request) => request.messages,
        Verdict::Refuse(refusal) => panic!("refused: {}", refusal.reason),
    }
}

/// The contents as they go on.
fn redact(session: &mut PiiRedact, contents: &[&str]) -> Vec<String> {
    let messages = contents.iter().map(|content| message(content, &[])).collect();
    sent(session, messages)
        .into_iter()
        .map(|message| message.content)
        .collect()
}

/// An answer's text as it leaves, when it comes in these pieces; what is not taken is shown again, as the host does.
fn answer<'a>(session: &mut PiiRedact, pieces: impl IntoIterator<Item = &'a str>) -> String {
    let mut out = String::new();
    let mut held = String::new();
    for piece in pieces {
        held.push_str(piece);
        let Ok(passage) = session.on_text(Channel::Content, &held) else {
            panic!("refused")
        };
        out.push_str(&passage.text);
        held.drain(..passage.taken_bytes as usize);
    }
    let Ok(rest) = session.finish(Channel::Content, &held) else {
        panic!("refused")
    };
    out + &rest
}

#[test]
fn values_go_out_of_the_request_and_come_back_in_the_answer() {
    let mut session = session(&json!({})).expect("a session");
    let redacted = redact(
        &mut session,
        &[
            "Write to anne@exemple.fr",
            "or call 06 12 34 56 78, not anne@exemple.fr",
        ],
    );
    assert_eq!(
        redacted,
        ["Write to [EMAIL_1]", "or call [PHONE_1], not [EMAIL_1]"]
    );
    let pieces = [
        "Dear [",
        "EMAIL",
        "_1], I call [PHONE_1",
        "] and [EMAIL_2] [",
        "x",
    ];
    assert_eq!(
        answer(&mut session, pieces),
        "Dear anne@exemple.fr, I call 06 12 34 56 78 and [EMAIL_2] [x"
    );
}

#[test]
fn an_answer_that_ends_within_a_placeholder_is_whole() {
    let mut session = session(&json!({})).expect("a session");
    redact(&mut session, &["a@b.fr"]);
    assert_eq!(answer(&mut session, ["to [EMAIL_"]), "to [EMAIL_");
}

#[test]
fn values_stay_away_where_they_are_not_to_be_restored() {
    let mut session = session(&json!({"restore": false, "kinds": ["phone", "email"]})).expect("a session");
    assert_eq!(
        redact(&mut session, &["a@b.fr 0612345678 4111111111111111"]),
        ["[EMAIL_1] [PHONE_1] 4111111111111111"]
    );
    assert_eq!(answer(&mut session, ["[EMAIL_1]"]), "[EMAIL_1]");
}

#[test]
fn arguments_of_tool_calls_are_redacted_as_json() {
    let mut session = session(&json!({})).expect("a session");
    let call = r#"{ "to": ["a@b.fr", "\n0612345678"], "card": 4111111111111111, "c@d.fr": null, "n": 7 }"#;
    let plain = r#"{ "n":  1.0 }"#;
    let sent = sent(&mut session, vec![message("", &[call, plain, "0612345678 {"])]);
    let arguments: Vec<&str> = sent[0]
        .tool_calls
        .iter()
        .map(|call| call.arguments_json.as_str())
        .collect();
    assert_eq!(
        arguments,
        [
            r#"{"to":["[EMAIL_1]","\n[PHONE_1]"],"card":"[CARD_1]","[EMAIL_2]":null,"n":7}"#,
            plain,
            "[PHONE_1] {"
        ]
    );
    let restored = answer(&mut session, [arguments[0]]);
    let restored: Value = json::from_str(&restored).expect("still JSON");
    assert_eq!(restored["to"], json!(["a@b.fr", "\n0612345678"]));
}

#[test]
fn senseless_parameters_are_named() {
    for (params, word) in [
        (json!([]), "object"),
        (json!({"kind": []}), "kind"),
        (json!({"kinds": "email"}), "list"),
        (json!({"kinds": ["email", "name"]}), "name"),
        (json!({"kinds": [1]}), "got 1"),
        (json!({"restore": "no"}), "params.restore"),
    ] {
        let Err(text) = session(&params) else {
            panic!("{params} was accepted")
        };
        assert!(text.contains(word), "{text}");
    }
}

/// Text in which personal data, placeholders and what looks like either are frequent.
fn any_text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        Just("a@b.fr".to_owned()),
        Just("é.x@ö.example".to_owned()),
        Just("06 12 34 56 78".to_owned()),
        Just("+1 (415) 555-2671".to_owned()),
        Just("FR7630006000011234567890189".to_owned()),
        Just("255081416802538".to_owned()),
        Just("4111-1111-1111-1111".to_owned()),
        Just("[EMAIL_1]".to_owned()),
        Just("[PHONE_2]".to_owned()),
        Just("[".to_owned()),
        Just(" ".to_owned()),
        "[a-z .@-]{0,6}",
        "\\PC{0,6}",
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

/// `text` cut at arbitrary places.
fn cut<'a>(text: &'a str, cuts: &[prop::sample::Index]) -> Vec<&'a str> {
    let boundaries: Vec<usize> = text
        .char_indices()
        .map(|(at, _)| at)
        .chain([text.len()])
        .collect();
    let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&boundaries)).collect();
    at.extend([0, text.len()]);
    at.sort_unstable();
    at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect()
}

proptest! {
    #[test]
    fn an_answer_that_repeats_the_request_is_the_request(
        text in any_text(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut session = session(&json!({})).expect("a session");
        let redacted = redact(&mut session, &[&text]).remove(0);
        let restored = answer(&mut session, cut(&redacted, &cuts));
        // A value that is spelled in several ways comes back as it was first spelled.
        let letters = |text: &str| text.to_lowercase().chars().filter(|c| c.is_alphanumeric()).collect::<String>();
        prop_assert_eq!(letters(&restored), letters(&text));
    }

    #[test]
    fn pieces_of_an_answer_may_be_cut_anywhere(
        text in any_text(),
        said in any_text(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut session = session(&json!({})).expect("a session");
        redact(&mut session, &[&text]);
        let whole = answer(&mut session, [said.as_str()]);
        prop_assert_eq!(answer(&mut session, cut(&said, &cuts)), whole);
    }

    #[test]
    fn text_without_personal_data_passes_unchanged(text in "[a-zA-Zàé \\[\\]_.,:;!?'\"\n-]{0,200}") {
        let mut session = session(&json!({})).expect("a session");
        let request = Request { messages: vec![message(&text, &[])], tools: vec![] };
        prop_assert!(matches!(session.on_request(request), Verdict::Pass));
        prop_assert_eq!(answer(&mut session, [text.as_str()]), text);
    }

    #[test]
    fn what_is_found_can_stand_in_json(text in any_text()) {
        for found in find::find(&text, &Kind::ALL) {
            let value = &text[found.range];
            prop_assert_eq!(json!(value).to_string(), format!("\"{value}\""));
        }
    }
}
