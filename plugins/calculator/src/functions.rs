//! Constants and functions by name.

use crate::number::Number::{self, Integer, Real};

/// The largest factorial that 128 bits hold.
const FACTORIAL_EXACT_MAX: i128 = 33;
/// The largest that floating point holds.
const FACTORIAL_MAX: i128 = 170;

/// A constant.
pub(crate) fn constant(name: &str) -> Option<Number> {
    Some(Real(match name {
        "pi" | "π" => std::f64::consts::PI,
        "tau" => std::f64::consts::TAU,
        "e" => std::f64::consts::E,
        _ => return None,
    }))
}

/// A function's value.
pub(crate) fn call(name: &str, arguments: &[Number]) -> Result<Number, String> {
    match (name, arguments) {
        ("min", [first, rest @ ..]) => Ok(pick(*first, rest, |new, best| new < best)),
        ("max", [first, rest @ ..]) => Ok(pick(*first, rest, |new, best| new > best)),
        ("gcd" | "lcm", [first, rest @ ..]) => divisors(name, *first, rest),
        ("round", [x]) => Ok(whole(*x, f64::round)),
        ("round", [x, digits]) => round(*x, *digits),
        ("log", [x, base]) => logarithm(*x, *base),
        ("pow", [base, exponent]) => base.power(*exponent),
        ("atan2", [y, x]) => Number::real(y.as_real().atan2(x.as_real())),
        ("hypot", [x, y]) => Number::real(x.as_real().hypot(y.as_real())),
        (_, [x]) => unary(name, *x),
        _ => Err(wrong_call(name, arguments.len())),
    }
}

fn unary(name: &str, x: Number) -> Result<Number, String> {
    let value = x.as_real();
    Number::real(match name {
        "abs" => return Ok(if value < 0.0 { x.negate() } else { x }),
        "sign" => return Ok(Integer(i128::from(value > 0.0) - i128::from(value < 0.0))),
        "floor" => return Ok(whole(x, f64::floor)),
        "ceil" => return Ok(whole(x, f64::ceil)),
        "trunc" => return Ok(whole(x, f64::trunc)),
        "factorial" => return factorial(x),
        "sqrt" => return square_root(x),
        "cbrt" => value.cbrt(),
        "exp" => value.exp(),
        "ln" => positive(name, x)?.ln(),
        "log10" => positive(name, x)?.log10(),
        "log2" => positive(name, x)?.log2(),
        "sin" => value.sin(),
        "cos" => value.cos(),
        "tan" => value.tan(),
        "asin" => unit(name, x)?.asin(),
        "acos" => unit(name, x)?.acos(),
        "atan" => value.atan(),
        "sinh" => value.sinh(),
        "cosh" => value.cosh(),
        "tanh" => value.tanh(),
        "degrees" => value.to_degrees(),
        "radians" => value.to_radians(),
        // There are bases enough to mean: 10, 2 and e.
        "log" => return Err("log: expected log(x, base), or ln, log10 or log2".to_owned()),
        _ => return Err(format!("there is no function \"{name}\"")),
    })
}

fn wrong_call(name: &str, got: usize) -> String {
    let arguments = match name {
        "round" => "1 or 2",
        "log" | "pow" | "atan2" | "hypot" => "2",
        "min" | "max" | "gcd" | "lcm" => "1 or more",
        // All functions of one argument have a value at 1.
        _ => match unary(name, Integer(1)) {
            Ok(_) => "1",
            Err(unknown) => return unknown,
        },
    };
    format!("{name}: arguments: expected {arguments}, got {got}")
}

fn positive(name: &str, x: Number) -> Result<f64, String> {
    let value = x.as_real();
    let wrong = || format!("{name}: expected a number above 0, got {x}");
    (value > 0.0).then_some(value).ok_or_else(wrong)
}

fn unit(name: &str, x: Number) -> Result<f64, String> {
    let value = x.as_real();
    let wrong = || format!("{name}: expected a number from -1 to 1, got {x}");
    (value.abs() <= 1.0).then_some(value).ok_or_else(wrong)
}

fn integer(name: &str, x: Number) -> Result<i128, String> {
    x.as_integer()
        .ok_or_else(|| format!("{name}: expected an integer, got {x}"))
}

fn pick(first: Number, rest: &[Number], better: fn(f64, f64) -> bool) -> Number {
    rest.iter().copied().fold(first, |best, new| {
        if better(new.as_real(), best.as_real()) {
            new
        } else {
            best
        }
    })
}

fn whole(x: Number, to_whole: fn(f64) -> f64) -> Number {
    match x {
        Integer(_) => x,
        Real(value) => {
            let rounded = Real(to_whole(value));
            rounded.as_integer().map_or(rounded, Integer)
        }
    }
}

fn round(x: Number, digits: Number) -> Result<Number, String> {
    let digits = integer("round", digits)?;
    let digits = u8::try_from(digits).ok().filter(|digits| *digits <= 15);
    let digits = digits.ok_or("round: expected 0 to 15 digits")?;
    match x {
        Integer(_) => Ok(x),
        // Through the decimal form: 2.675 has no exact double, and multiplying would round it twice.
        Real(value) => Number::real(
            format!("{value:.*}", usize::from(digits))
                .parse()
                .unwrap_or(value),
        ),
    }
}

fn square_root(x: Number) -> Result<Number, String> {
    let value = x.as_real();
    if value < 0.0 {
        return Err(format!("sqrt: expected a number from 0, got {x}"));
    }
    let exact = match x {
        Integer(square) => Some(square.isqrt()).filter(|root| root * root == square),
        Real(_) => None,
    };
    Ok(exact.map_or(Real(value.sqrt()), Integer))
}

fn logarithm(x: Number, base: Number) -> Result<Number, String> {
    let (value, base_value) = (positive("log", x)?, positive("log", base)?);
    match base {
        Integer(10) => Number::real(value.log10()),
        Integer(2) => Number::real(value.log2()),
        Integer(1) => Err("log: the base must not be 1".to_owned()),
        _ => Number::real(value.ln() / base_value.ln()),
    }
}

fn factorial(x: Number) -> Result<Number, String> {
    let n = integer("factorial", x)?;
    if !(0..=FACTORIAL_MAX).contains(&n) {
        return Err(format!(
            "factorial: expected an integer from 0 to {FACTORIAL_MAX}, got {x}"
        ));
    }
    if n <= FACTORIAL_EXACT_MAX {
        return Ok(Integer((1..=n).product()));
    }
    Number::real((1..=n).map(|factor| factor as f64).product())
}

fn divisors(name: &str, first: Number, rest: &[Number]) -> Result<Number, String> {
    let mut value = integer(name, first)?.unsigned_abs();
    for other in rest {
        let other = integer(name, *other)?.unsigned_abs();
        let divisor = greatest_divisor(value, other);
        value = match name {
            "gcd" => divisor,
            _ if divisor == 0 => 0,
            _ => (value / divisor)
                .checked_mul(other)
                .ok_or_else(|| format!("{name}: the value is too large"))?,
        };
    }
    let value = i128::try_from(value).map_err(|_| format!("{name}: the value is too large"))?;
    Ok(Integer(value))
}

fn greatest_divisor(mut left: u128, mut right: u128) -> u128 {
    while right != 0 {
        (left, right) = (right, left % right);
    }
    left
}
