//! Guests that behave: what goes in and out of each world, through the real boundary.

mod guests;

use std::sync::atomic::Ordering;

use galerne_core::chat::{ChatError, ChatOptions, Delta, Message, Segment};
use galerne_core::graph::{Activation, Graph, Op};
use galerne_core::guest::SequenceInfo;
use galerne_core::ids::NodeId;
use guests::{Chat, Model, Sampler, choose, counting_waker, host, plan, words};

#[test]
fn a_graph_arrives_as_it_was_built() {
    // result: ok; nodes at 512, two of 72 bytes; output 1; context 2048.
    let more = format!(
        r#"(data (i32.const 64) "{}") (data (i32.const 512) "{}") (data (i32.const 584) "{}")"#,
        words(&[0, 512, 2, 1, 2_048]),
        words(&[8, 0, 0.5f32.to_bits()]),
        words(&[9, 0, 2]),
    );
    let guest = Model {
        build: "(i32.const 64)",
        more: &more,
        ..Model::default()
    };
    let guest = host().load_model("good", &guest.component()).expect("it fits");
    assert_eq!(guest.model_types().expect("answers"), ["hostile"]);
    let expected = Graph {
        nodes: vec![
            Op::Scale {
                x: NodeId(0),
                factor: 0.5,
            },
            Op::Activate {
                x: NodeId(0),
                function: Activation::GeluTanh,
            },
        ],
        output: NodeId(1),
        context_tokens_max: 2_048,
    };
    assert_eq!(guest.build("{}").expect("built"), expected);
    assert_eq!(guest.build("{}").expect("built again"), expected);
}

#[test]
fn a_conversation_goes_in_and_comes_out() {
    let guest = host()
        .load_chat("good", &Chat::default().component())
        .expect("it fits");
    assert!(
        guest
            .recognises(Some("template"), &["<s>".to_owned()])
            .expect("answers")
    );
    let message = Message {
        role: "user".to_owned(),
        content: "héllo".to_owned(),
        tool_calls: vec![],
        tool_call_id: None,
    };
    let segments = guest
        .render(&[message], &[], &ChatOptions::default())
        .expect("renders");
    assert_eq!(
        segments,
        [
            Segment::Special("<s>".to_owned()),
            Segment::Text("héllo".to_owned())
        ]
    );
    let mut parsers = [0, 1].map(|_| guest.parser(&ChatOptions::default()).expect("a parser"));
    for parser in &mut parsers {
        assert_eq!(
            parser.push("ab").expect("parses"),
            [Delta::Content("ab".to_owned())]
        );
        assert_eq!(parser.push("").expect("parses"), [Delta::Content(String::new())]);
        assert_eq!(parser.finish().expect("ends"), []);
    }
}

#[test]
fn messages_a_format_cannot_express_are_the_callers_mistake() {
    // error at 128: messages("hostile" cut to three bytes, at 244).
    let render = "(i32.store8 (i32.const 128) (i32.const 1)) (i32.store8 (i32.const 132) (i32.const 0))
        (i32.store (i32.const 136) (i32.const 244)) (i32.store (i32.const 140) (i32.const 3)) (i32.const 128)";
    let guest = Chat {
        render,
        ..Chat::default()
    };
    let guest = host().load_chat("good", &guest.component()).expect("it fits");
    let error = guest
        .render(&[], &[], &ChatOptions::default())
        .expect_err("refused");
    assert_eq!(error, ChatError::Messages("<s>".to_owned()));
}

#[test]
fn a_session_plans_and_chooses() {
    let guest = host()
        .load_sampler("good", &Sampler::default().component())
        .expect("it fits");
    let (waker, wakes) = counting_waker();
    let mut session = guest
        .session(&SequenceInfo::new("{}", 1_000, 0), waker)
        .expect("a session");
    let first = plan(&mut session, 7, &[1, 2, 3]).expect("a plan");
    assert_eq!((first.temperature, first.candidates), (7.0, 3));
    assert_eq!(
        (first.repetition_penalty, first.top_p, first.top_k),
        (1.0, 1.0, 0)
    );
    assert_eq!(choose(&mut session, 5), Ok(4));
    let second = plan(&mut session, 8, &[]).expect("a plan");
    assert_eq!((second.temperature, second.candidates), (8.0, 0));
    // The last wake-up follows its answer by an instant.
    while wakes.load(Ordering::SeqCst) < 3 {
        std::thread::yield_now();
    }
}

#[test]
fn sessions_have_separate_instances() {
    // The temperature is the number of plans this instance has made.
    let plan_body =
        "(f32.store (i32.const 148) (f32.add (f32.load (i32.const 148)) (f32.const 1))) (i32.const 128)";
    let guest = Sampler {
        plan: plan_body,
        ..Sampler::default()
    };
    let guest = host()
        .load_sampler("counter", &guest.component())
        .expect("it fits");
    let mut sessions = [0, 1].map(|_| {
        guest
            .session(&SequenceInfo::new("{}", 10, 0), counting_waker().0)
            .expect("a session")
    });
    for expected in 1..4u8 {
        for session in &mut sessions {
            assert_eq!(
                plan(session, 0, &[]).expect("a plan").temperature,
                f32::from(expected)
            );
        }
    }
}

#[test]
fn an_instance_starts_with_clean_memory() {
    // Whether one of two bytes was written before; then writes them. Slots of the pool are reused: the first byte
    // lies in the part that is cleared by writing, the second in the part that is given back.
    let recognises = "(drop (memory.grow (i32.const 8)))
        (i32.or (i32.load8_u (i32.const 60000)) (i32.load8_u (i32.const 500000)))
        (i32.store8 (i32.const 60000) (i32.const 1)) (i32.store8 (i32.const 500000) (i32.const 1))";
    let guest = Chat {
        recognises,
        ..Chat::default()
    };
    let guest = host().load_chat("nosy", &guest.component()).expect("it fits");
    for _ in 0..40 {
        assert_eq!(guest.recognises(None, &[]), Ok(false));
    }
}
