//! Random JSON schemas of the kinds people write for structured output.

use serde_json::{Map, Value, json};

type Random<'a> = &'a mut dyn FnMut(usize) -> usize;

/// A schema with definitions, some of which it refers to.
pub(crate) fn random_schema(random: Random<'_>) -> Value {
    let mut schema = if random(4) == 0 {
        any(random, 3)
    } else {
        object(random, 3)
    };
    schema["$defs"] = json!({
        "leaf": leaf(random),
        "pair": object(random, 1),
        // Refers to itself, and can end.
        "tree": {"type": "object", "properties": {
            "v": {"type": "integer", "minimum": 0, "maximum": 99},
            "children": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/tree"}}},
            "required": ["v"], "additionalProperties": false},
    });
    schema
}

fn any(random: Random<'_>, depth: usize) -> Value {
    if depth == 0 {
        return leaf(random);
    }
    match random(9) {
        0 | 1 => object(random, depth - 1),
        2 => array(random, depth - 1),
        3 => json!({"anyOf": [any(random, depth - 1), leaf(random)]}),
        4 => json!({"$ref": (["#/$defs/leaf", "#/$defs/tree"][random(2)])}),
        5 => json!({"type": ["string", "null"], "maxLength": random(5)}),
        _ => leaf(random),
    }
}

fn leaf(random: Random<'_>) -> Value {
    match random(12) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let low = i64::try_from(random(2_000)).expect("small") - 1_000;
            json!({"type": "integer", "minimum": low, "maximum": low + i64::try_from(random(500)).expect("small")})
        }
        3 => {
            json!({"type": "integer", "exclusiveMinimum": random(10), "multipleOf": ([2, 3, 5][random(3)]), "maximum": 10_000})
        }
        4 => json!({"type": "number", "minimum": 0, "exclusiveMaximum": 1 + random(100)}),
        5 => {
            let low = random(4);
            json!({"type": "string", "minLength": low, "maxLength": low + random(12)})
        }
        6 => {
            json!({"type": "string", "pattern": (["^[a-z]{1,8}$", "^\\d{3}-[A-F]+$", "^(né|日)+$", "^a?b*c$"][random(4)])})
        }
        7 => json!({"enum": ["red", "green\n", 3, null, true, "né\"e", [1, "x"]]}),
        8 => json!({"const": ([json!("fixed"), json!(0), json!({"a": [1]})][random(3)])}),
        9 => {
            json!({"type": "string", "format": (["date", "time", "date-time", "uuid", "email", "ipv4"][random(6)])})
        }
        10 => json!({"type": "string", "enum": ["a", "ab", "abc", ""]}),
        _ => json!({"type": "integer"}),
    }
}

fn object(random: Random<'_>, depth: usize) -> Value {
    let names = ["name", "na", "né", "a b", "quo\"te", "x", "id", "\u{1f600}"];
    let mut properties = Map::new();
    let mut required = Vec::new();
    for _ in 0..=random(5) {
        let name = names[random(names.len())];
        if random(2) == 0 && !required.contains(&name) {
            required.push(name);
        }
        properties.insert(name.to_owned(), any(random, depth));
    }
    let mut object = json!({"type": "object", "properties": properties, "required": required});
    match random(4) {
        0 => object["additionalProperties"] = json!({"type": "integer", "minimum": 0, "maximum": 9}),
        1 => object["patternProperties"] = json!({"^n_": {"type": "boolean"}}),
        _ => {}
    }
    if random(6) > 0 && object.get("additionalProperties").is_none() {
        object["additionalProperties"] = json!(false);
    }
    object
}

fn array(random: Random<'_>, depth: usize) -> Value {
    let low = random(3);
    let mut array =
        json!({"type": "array", "items": any(random, depth), "minItems": low, "maxItems": low + random(4)});
    if random(5) == 0 {
        array["prefixItems"] = json!([leaf(random), leaf(random)]);
    }
    array
}
