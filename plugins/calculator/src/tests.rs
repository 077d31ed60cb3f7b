//! Expressions and their values; and, over generated ones, that precedence is that of the same expression in Rust.

use galerne_sdk::json::json;
use galerne_sdk::tool::{Error, RequestInfo, Tools};
use proptest::prelude::*;

use crate::Calculator;
use crate::evaluate::evaluate;

fn check(expression: &str, expected: &str) {
    let got = evaluate(expression).map(|value| value.to_string());
    assert_eq!(got, Ok(expected.to_owned()), "{expression}");
}

fn check_error(expression: &str, words: &str) {
    let error = evaluate(expression).expect_err(expression);
    assert!(
        error.contains(words),
        "{expression}: expected \"{words}\" in \"{error}\""
    );
}

#[test]
fn precedence_is_that_of_mathematics() {
    for (expression, expected) in [
        ("1 + 2 * 3", "7"),
        ("(1 + 2) * 3", "9"),
        ("10 - 4 - 3", "3"),
        ("100 / 10 / 5", "2"),
        ("2 ^ 3 ^ 2", "512"),
        ("-2 ^ 2", "-4"),
        ("(-2) ^ 2", "4"),
        ("2 ^ -1", "0.5"),
        ("2 ** 10", "1024"),
        ("- -3", "3"),
        ("7 % 4 * 2", "6"),
        ("-7 % 3", "2"),
        ("7 % -3", "-2"),
        ("-7.5 % 2", "0.5"),
        ("3 × 4 ÷ 2 − 1", "5"),
    ] {
        check(expression, expected);
    }
}

#[test]
fn values_are_decimals_as_one_writes_them() {
    for (expression, expected) in [
        ("0.1 + 0.2", "0.3"),
        ("19.99 * 3", "59.97"),
        ("1 / 3", "0.333333333333333"),
        ("2 / 3", "0.666666666666667"),
        ("6 / 3", "2"),
        ("1e3", "1000"),
        ("1.50", "1.5"),
        (".5", "0.5"),
        ("5.", "5"),
        ("1_000_000", "1000000"),
        ("2.5e-9", "2.5e-9"),
        ("0.00001", "0.00001"),
        ("1.5e300 * 2", "3e300"),
        ("0 * -1.5", "0"),
        ("999999999999.5 + 0.25", "999999999999.75"),
    ] {
        check(expression, expected);
    }
}

#[test]
fn integers_are_exact() {
    check("2 ^ 64", "18446744073709551616");
    check(
        "123456789123456789 * 987654321987654321",
        "121932631356500531347203169112635269",
    );
    check("factorial(30)", "265252859812191058636308480000000");
    check(
        "170141183460469231731687303715884105727 + 1",
        "1.70141183460469e38",
    );
    check("99999999999999999999 / 3", "33333333333333333333");
}

#[test]
fn functions_have_their_values() {
    for (expression, expected) in [
        ("sqrt(16) + cbrt(27)", "7"),
        ("sqrt(2) ^ 2", "2"),
        ("round(2.5) + round(-2.4)", "1"),
        ("round(3.14159, 2)", "3.14"),
        ("floor(-1.5) + ceil(1.2) + trunc(-1.9)", "-1"),
        ("abs(-3) + sign(-9)", "2"),
        ("ln(e)", "1"),
        ("log10(1000) + log2(8) + log(81, 3)", "10"),
        ("round(sin(pi / 6), 10)", "0.5"),
        ("degrees(pi)", "180"),
        ("cos(radians(180))", "-1"),
        ("atan2(1, 1) * 4 - pi", "0"),
        ("hypot(3, 4)", "5"),
        ("min(3, 1, 2) + max(3, 1.5)", "4"),
        ("gcd(12, 18) + lcm(4, 6)", "18"),
        ("factorial(5)", "120"),
        ("SQRT(4)", "2"),
    ] {
        check(expression, expected);
    }
}

#[test]
fn errors_say_what_is_wrong_and_where() {
    for (expression, words) in [
        ("", "character 1: expected a number"),
        ("1 +", "got the end"),
        ("(1", "expected \")\", got the end"),
        ("1 2", "character 3: expected an operator or the end, got \"2\""),
        ("2 * x", "character 5: expected pi, tau, e or a function"),
        ("f(1)", "no function \"f\""),
        ("f(1, 2)", "no function \"f\""),
        ("sqrt(1, 2)", "sqrt: arguments: expected 1, got 2"),
        ("min()", "expected a number"),
        ("1.2.3", "an operator"),
        ("2e", "an operator"),
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("0 ^ -1", "zero to a negative power"),
        ("sqrt(-1)", "from 0, got -1"),
        ("(-8) ^ 0.5", "not defined"),
        ("ln(0)", "above 0"),
        ("acos(2)", "from -1 to 1"),
        ("factorial(1.5)", "an integer"),
        ("10 ^ 400", "too large"),
        ("log(8)", "log(x, base)"),
        ("import os", "got \"import\""),
    ] {
        check_error(expression, words);
    }
    check_error(&"(".repeat(5_000), "at most 200 levels");
    check_error(&"-".repeat(5_000), "at most 200 levels");
    check_error(&"2^".repeat(2_500), "at most 200 levels");
    check_error(&"1+".repeat(6_000), "at most 10000 bytes");
}

#[test]
fn a_model_calls_it() {
    let info = RequestInfo {
        params_json: "{}".to_owned(),
        id: "1".to_owned(),
        model: "m".to_owned(),
    };
    let call = |arguments| Calculator::call(&json!({}), &info, "calculate", &arguments);
    assert!(matches!(call(json!({"expression": "6 * 7"})), Ok(value) if value == "42"));
    for arguments in [json!({}), json!({"expression": 42}), json!({"expression": "6 *"})] {
        assert!(matches!(call(arguments), Err(Error::Arguments(_))));
    }
    assert_eq!(Calculator::list(&json!({})).expect("lists").len(), 1);
    assert!(Calculator::list(&json!({"precision": 3})).is_err());
}

/// An expression with the parentheses that its tree needs and no others, and its value.
#[derive(Debug, Clone)]
struct Known {
    text: String,
    value: i128,
    /// 3 an atom, 2 a product, 1 a sum.
    binds: u8,
}

impl Known {
    fn within(&self, binds: u8) -> String {
        if self.binds < binds {
            format!("({})", self.text)
        } else {
            self.text.clone()
        }
    }
}

fn known() -> impl Strategy<Value = Known> {
    let leaf = (0..1_000_i128).prop_map(|value| Known {
        text: value.to_string(),
        value,
        binds: 3,
    });
    leaf.prop_recursive(5, 40, 2, |inner| {
        (inner.clone(), inner, 0..3).prop_map(|(left, right, operator)| {
            let (sign, binds, value) = match operator {
                0 => ("+", 1, left.value.checked_add(right.value)),
                1 => ("-", 1, left.value.checked_sub(right.value)),
                _ => ("*", 2, left.value.checked_mul(right.value)),
            };
            // Operators group to the left: the right side needs parentheses also where it binds as tightly.
            let text = format!("{} {sign} {}", left.within(binds), right.within(binds + 1));
            Known {
                text,
                value: value.expect("32 factors below 1000 stay below 2^127 in trees this small"),
                binds,
            }
        })
    })
}

proptest! {
    #[test]
    fn integers_are_computed_as_by_hand(known in known().prop_filter("small", |known| known.value.abs() < 1 << 100)) {
        prop_assert_eq!(evaluate(&known.text).map(|value| value.to_string()), Ok(known.value.to_string()));
    }

    #[test]
    fn no_text_makes_it_panic(text in "[-+*/%^(). 0-9epilnsqrtmax,_]{0,60}|\\PC{0,40}") {
        if let Ok(value) = evaluate(&text) {
            prop_assert!(value.as_real().is_finite(), "{} is {}", text, value);
        }
    }

    #[test]
    fn what_it_writes_it_reads(value in -1e18..1e18_f64) {
        let written = evaluate(&format!("{value:.12}")).expect("a number").to_string();
        let again = evaluate(&written).expect("what it wrote").to_string();
        prop_assert_eq!(written, again);
    }
}
