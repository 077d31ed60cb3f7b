//! A tiny tokenizer made here, and the demo model's where it is.

use std::sync::Arc;

use galerne_core::chat::Segment;
use galerne_core::ids::TokenId;

use super::{Tokenizer, TokenizerError};

/// A byte-level tokenizer of all 256 bytes, one merge, a control token and a user-defined marker.
fn byte_level(ignore_merges: bool) -> Arc<Tokenizer> {
    let table = super::spelling_table_for_tests();
    let mut vocab = serde_json::Map::new();
    for (character, byte) in table {
        vocab.insert(character.to_string(), u32::from(byte).into());
    }
    vocab.insert("he".into(), 256.into());
    vocab.insert("<|end|>".into(), 257.into());
    let added = |id: u32, content: &str, special: bool| {
        serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": special})
    };
    let json = serde_json::json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": [added(257, "<|end|>", true), added(258, "<mark>", false)],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
            "vocab": vocab, "merges": [["h", "e"]]},
    });
    Arc::new(Tokenizer::from_bytes(json.to_string().as_bytes()).expect("tokenizer"))
}

fn ids(raw: &[u32]) -> Vec<TokenId> {
    raw.iter().copied().map(TokenId).collect()
}

#[test]
fn text_never_becomes_a_special_token() {
    let tokenizer = byte_level(false);
    let plain = tokenizer.encode("a<|end|>").expect("encode");
    assert_eq!(plain.len(), 8);
    assert!(!plain.contains(&TokenId(257)));
    assert_eq!(
        tokenizer.encode_special("a<|end|>").expect("encode"),
        ids(&[97, 257])
    );
}

#[test]
fn a_vocabulary_that_forges_special_tokens_is_refused() {
    let error = byte_level(true)
        .encode("<|end|>")
        .expect_err("whole-word lookup finds the special token");
    assert!(matches!(error, TokenizerError::ForgedSpecial(name) if name == "<|end|>"));
}

#[test]
fn adjacent_text_segments_are_one_text() {
    let tokenizer = byte_level(false);
    let segments = [
        Segment::Text("h".into()),
        Segment::Text("e".into()),
        Segment::Special("<|end|>".into()),
        Segment::Text("h".into()),
        Segment::Special("<mark>".into()),
    ];
    assert_eq!(
        tokenizer.encode_segments(&segments).expect("encode"),
        ids(&[256, 257, 104, 258])
    );
    let error = tokenizer
        .encode_segments(&[Segment::Special("<|no|>".into())])
        .expect_err("unknown");
    assert!(error.to_string().contains("<|no|>"), "{error}");
}

#[test]
fn special_tokens_have_no_bytes_and_markers_do() {
    let tokenizer = byte_level(false);
    assert_eq!(tokenizer.vocabulary(), 259);
    assert!(tokenizer.is_special(TokenId(257)) && !tokenizer.is_special(TokenId(258)));
    assert!(tokenizer.token_bytes(TokenId(257)).is_empty());
    assert_eq!(tokenizer.token_bytes(TokenId(258)), b"<mark>");
    assert_eq!(tokenizer.token_bytes(TokenId(10)), b"\n");
    assert_eq!(tokenizer.token_bytes(TokenId(9_999)), b"");
    assert_eq!(tokenizer.special_tokens(), ["<|end|>", "<mark>"]);
    assert_eq!(
        tokenizer.special_id("he"),
        None,
        "an ordinary token is not special"
    );
}

#[test]
fn a_stream_gives_whole_characters() {
    let tokenizer = byte_level(false);
    let mut stream = tokenizer.stream();
    let text = "né€😀";
    let pieces: Vec<String> = tokenizer
        .encode(text)
        .expect("encode")
        .into_iter()
        .map(|id| stream.push(id))
        .collect();
    assert_eq!(pieces, ["n", "", "é", "", "", "€", "", "", "", "😀"]);
    assert_eq!(stream.push(TokenId(0xe2)), "");
    assert_eq!(stream.finish(), "\u{fffd}");
    assert_eq!(stream.finish(), "");
    assert_eq!(tokenizer.decode(&tokenizer.encode(text).expect("encode")), text);
}

#[test]
fn foreign_bytes_are_an_error() {
    for bytes in [&b""[..], b"{}", b"[]", b"\xff", b"{\"model\": 3}"] {
        assert!(
            matches!(Tokenizer::from_bytes(bytes), Err(TokenizerError::Parse(_))),
            "{bytes:?}"
        );
    }
}

#[test]
fn ids_that_no_token_has_are_empty() {
    let json = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": {"first": 1, "last": 4}, "unk_token": "first"}}"#;
    let tokenizer = Tokenizer::from_bytes(json.as_bytes()).expect("tokenizer");
    assert_eq!(tokenizer.vocabulary(), 5);
    for (id, name) in [
        (0, None),
        (1, Some("first")),
        (2, None),
        (3, None),
        (4, Some("last")),
        (5, None),
    ] {
        let id = TokenId(id);
        assert_eq!(tokenizer.token_name(id), name);
        assert_eq!(tokenizer.token_bytes(id), name.unwrap_or_default().as_bytes());
    }
}
