//! Numbers with a checksum: IBAN, French NIR, payment cards.

/// Between groups, one at a time: spaces (also those that do not break), hyphens and full stops.
pub(crate) const SEPARATORS: [char; 5] = [' ', '\u{a0}', '\u{202f}', '-', '.'];

/// Length of an IBAN by country (SWIFT's IBAN registry, release 100). Without it an IBAN would not end.
const IBAN_LENGTHS: &str = "\
    AD24 AE23 AL28 AT20 AZ28 BA20 BE16 BG22 BH22 BI27 BR29 BY28 CH21 CR22 CY28 CZ24 DE22 DJ27 DK18 DO28 EE20 EG29 \
    ES24 FI18 FK18 FO18 FR27 GB22 GE22 GI23 GL18 GR27 GT28 HN28 HR21 HU28 IE22 IL23 IQ23 IS26 IT27 JO30 KW30 KZ20 \
    LB28 LC32 LI21 LT20 LU20 LV21 LY25 MC27 MD24 ME22 MK19 MN20 MR27 MT31 MU30 NI28 NL18 NO15 OM23 PK24 PL28 PS29 \
    PT25 QA29 RO24 RS22 RU33 SA24 SC31 SD18 SE24 SI19 SK24 SM27 SO23 ST25 SV28 TL23 TN24 TR26 UA29 VA22 VG24 XK20 \
    YE30";
const IBAN_LENGTH_MAX: usize = 34;

/// First digits of card numbers, from and to, with the lengths they come in (ISO/IEC 7812 as the schemes use it):
/// Visa, Mastercard twice, American Express, Diners, JCB, Discover, UnionPay, Maestro.
const CARDS: [(u32, u32, &[usize]); 14] = [
    (4, 4, &[13, 16, 19]),
    (51, 55, &[16]),
    (2221, 2720, &[16]),
    (34, 34, &[15]),
    (37, 37, &[15]),
    (300, 305, &[14, 16, 19]),
    (36, 36, &[14, 16, 19]),
    (38, 39, &[14, 16, 19]),
    (3528, 3589, &[16, 17, 18, 19]),
    (60, 61, &[16, 17, 18, 19]),
    (62, 62, &[16, 17, 18, 19]),
    (63, 69, &[16, 17, 18, 19]),
    (50, 50, &[13, 14, 15, 16, 17, 18, 19]),
    (56, 59, &[13, 14, 15, 16, 17, 18, 19]),
];
const CARD_DIGITS_MAX: usize = 19;

const NIR_LENGTH: usize = 15;

/// The length in bytes of the IBAN that `text` begins with: known country, its length, and ISO 7064 mod 97-10.
pub(crate) fn iban(text: &str) -> Option<usize> {
    // First, because every word of a text comes here.
    if !text.as_bytes().get(2..4)?.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let country = text.get(..2)?.to_ascii_uppercase();
    let length = IBAN_LENGTHS
        .split(' ')
        .find_map(|entry| entry.strip_prefix(country.as_str())?.parse::<usize>().ok())?;
    let read = Spelled::read(text, IBAN_LENGTH_MAX, |c| c.is_ascii_alphanumeric());
    let end = read.end_of(text, length)?;
    let number = &read.characters[..length];
    // Country and check digits go to the end, letters count from 10.
    let rest = number[4..].iter().chain(&number[..4]);
    let remainder = rest.fold(0, |remainder, c| match c.to_digit(36) {
        Some(digit) if digit < 10 => (remainder * 10 + digit) % 97,
        Some(letter) => (remainder * 100 + letter) % 97,
        None => remainder,
    });
    (remainder == 1).then_some(end)
}

/// The length in bytes of the French social security number that `text` begins with: sex, year, month, department (2A and
/// 2B in Corsica), commune, order, and the key (INSEE).
pub(crate) fn nir(text: &str) -> Option<usize> {
    let read = Spelled::read(text, NIR_LENGTH, |c| c.is_ascii_digit() || "abAB".contains(c));
    let end = read.end_of(text, NIR_LENGTH)?;
    let mut number: String = read.characters[..NIR_LENGTH].iter().collect();
    // For the key, the departments of Corsica count as 19 and 18.
    match number[5..7].to_ascii_uppercase().as_str() {
        "2A" => number.replace_range(5..7, "19"),
        "2B" => number.replace_range(5..7, "18"),
        _ => {}
    }
    let sex: u64 = number[..1].parse().ok()?;
    let month: u64 = number[3..5].parse().ok()?;
    let counted: u64 = number[..13].parse().ok()?;
    let key: u64 = number[13..].parse().ok()?;
    // 3, 4, 7 and 8 are provisional numbers; months from 20 on stand for one that is not known.
    let plausible = matches!(sex, 1..=4 | 7 | 8) && matches!(month, 1..=12 | 20..=42 | 50..=99);
    (plausible && key == 97 - counted % 97).then_some(end)
}

/// The length in bytes of the card number that `text` begins with: a scheme's first digits and length, and Luhn's
/// check digit (ISO/IEC 7812-1). The longest, where several fit.
pub(crate) fn card(text: &str) -> Option<usize> {
    let read = Spelled::read(text, CARD_DIGITS_MAX, |c| c.is_ascii_digit());
    let digits: Vec<u32> = read.characters.iter().filter_map(|c| c.to_digit(10)).collect();
    let lengths = CARDS.iter().find_map(|(from, to, lengths)| {
        let count = from.to_string().len();
        let first = digits
            .get(..count)?
            .iter()
            .fold(0, |number, digit| number * 10 + digit);
        (*from..=*to).contains(&first).then_some(*lengths)
    })?;
    let fits = |length: &usize| {
        let end = read.end_of(text, *length)?;
        luhn(&digits[..*length]).then_some(end)
    };
    lengths.iter().rev().find_map(fits)
}

fn luhn(digits: &[u32]) -> bool {
    let doubled = |digit: u32| if digit > 4 { 2 * digit - 9 } else { 2 * digit };
    let sum: u32 = digits
        .iter()
        .rev()
        .enumerate()
        .map(|(place, digit)| if place % 2 == 1 { doubled(*digit) } else { *digit })
        .sum();
    sum.is_multiple_of(10)
}

/// The characters of a number as it is written, without its separators.
struct Spelled {
    characters: Vec<char>,
    /// The byte after each.
    ends: Vec<usize>,
}

impl Spelled {
    /// Reads at most `characters_max` from the start of `text`, with at most one separator between two.
    fn read(text: &str, characters_max: usize, accept: impl Fn(char) -> bool) -> Self {
        let mut read = Self {
            characters: Vec::new(),
            ends: Vec::new(),
        };
        let mut separated = true;
        for (at, c) in text.char_indices() {
            if read.characters.len() < characters_max && accept(c) {
                read.characters.push(c);
                read.ends.push(at + c.len_utf8());
                separated = false;
            } else if !separated && SEPARATORS.contains(&c) {
                separated = true;
            } else {
                break;
            }
        }
        read
    }

    /// The byte after the first `length` characters, if so many were read and no word or number goes on there.
    fn end_of(&self, text: &str, length: usize) -> Option<usize> {
        let end = *self.ends.get(length.checked_sub(1)?)?;
        ends_at(text, end).then_some(end)
    }
}

/// Whether no word or number goes on at this byte.
pub(crate) fn ends_at(text: &str, end: usize) -> bool {
    !text[end..].starts_with(|c: char| c.is_ascii_alphanumeric())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Found whole, alone and before other text, and not at all with any other last digit.
    fn check(find: fn(&str) -> Option<usize>, number: &str) {
        assert_eq!(find(number), Some(number.len()), "{number}");
        for more in [".", " 12", " ab", "\n4111"] {
            assert_eq!(
                find(&format!("{number}{more}")),
                Some(number.len()),
                "{number}{more}"
            );
        }
        let (head, last) = number.split_at(number.len() - 1);
        for digit in ('0'..='9').filter(|digit| !last.starts_with(*digit)) {
            assert_eq!(find(&format!("{head}{digit}")), None, "{head}{digit}");
        }
        assert_eq!(find(&format!("{number}0")), None, "it does not end there");
    }

    #[test]
    fn ibans() {
        for number in [
            "FR7630006000011234567890189",
            "FR76 3000 6000 0112 3456 7890 189",
            "FR76\u{a0}3000\u{202f}6000-0112.3456 7890 189",
            "fr14 2004 1010 0505 0001 3m02 606",
            "DE89370400440532013000",
            "GB29 NWBK 6016 1331 9268 19",
            "NO9386011117947",
            "MT84MALT011000012345MTLCAST001S",
            "BE68 5390 0754 7034",
        ] {
            assert_eq!(iban(number), Some(number.len()), "{number}");
        }
        check(iban, "FR76 3000 6000 0112 3456 7890 189");
        for number in [
            "ZZ7630006000011234567890189",
            "FR76",
            "FR",
            "F",
            "é",
            "FR76 3000  6000 0112 3456 7890 189",
        ] {
            assert_eq!(iban(number), None, "{number}");
        }
    }

    #[test]
    fn nirs() {
        check(nir, "255081416802538");
        check(nir, "2 55 08 14 168 025 38");
        // In Corsica, with the key of the number with 19 or 18 in the department's place.
        let keyed = |number: &str, counted: u64| format!("{number}{:02}", 97 - counted % 97);
        for (number, counted) in [
            ("185052A004084", 1_850_519_004_084),
            ("185052B004084", 1_850_518_004_084),
            ("185052a004084", 1_850_519_004_084),
        ] {
            check(nir, &keyed(number, counted));
        }
        let wrong = keyed("185052B004084", 1_850_519_004_084);
        assert_eq!(nir(&wrong), None, "2B is not 2A");
        // A right key does not make up for a month or sex that cannot be.
        for counted in [1_851_378_006_084_u64, 1_850_078_006_084, 5_850_578_006_084] {
            assert_eq!(nir(&keyed(&counted.to_string(), counted)), None, "{counted}");
        }
        assert_eq!(nir("2A5081416802538"), None);
    }

    #[test]
    fn cards() {
        for number in [
            "4111 1111 1111 1111",
            "4222222222222",
            "5555-5555-5555-4444",
            "2223003122003222",
            "3782 822463 10005",
            "6200000000000005",
        ] {
            check(card, number);
        }
        // Of schemes with several lengths, so that a longer one may be a card number too.
        for number in ["30569309025904", "3530111333300000", "6011111111111117"] {
            assert_eq!(card(number), Some(number.len()), "{number}");
        }
        for number in [
            "1234567890123452", // no scheme's
            "0000000000000000",
            "5555 5555 5555 444",
            "411111111111111111111111",
        ] {
            assert_eq!(card(number), None, "{number}");
        }
    }

    #[test]
    fn a_card_may_be_followed_by_its_code() {
        let text = "4111 1111 1111 1111 123";
        assert!(card(text).is_some_and(|end| end >= 19), "{:?}", card(text));
    }
}
