//! Which addresses are of the public Internet. Opens no connection.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// IPv4 ranges that are not (the IANA registry of special-purpose addresses, and multicast).
const RESERVED_V4: &[(Ipv4Addr, u32)] = &[
    (Ipv4Addr::new(0, 0, 0, 0), 8),
    (Ipv4Addr::new(10, 0, 0, 0), 8),
    (Ipv4Addr::new(100, 64, 0, 0), 10),
    (Ipv4Addr::new(127, 0, 0, 0), 8),
    (Ipv4Addr::new(169, 254, 0, 0), 16),
    (Ipv4Addr::new(172, 16, 0, 0), 12),
    (Ipv4Addr::new(192, 0, 0, 0), 24),
    (Ipv4Addr::new(192, 0, 2, 0), 24),
    (Ipv4Addr::new(192, 88, 99, 0), 24),
    (Ipv4Addr::new(192, 168, 0, 0), 16),
    (Ipv4Addr::new(198, 18, 0, 0), 15),
    (Ipv4Addr::new(198, 51, 100, 0), 24),
    (Ipv4Addr::new(203, 0, 113, 0), 24),
    (Ipv4Addr::new(224, 0, 0, 0), 3),
    // Cloud providers' metadata and platform services outside the ranges above.
    (Ipv4Addr::new(168, 63, 129, 16), 32),
];

/// IPv6 ranges within 2000::/3 that are not: protocols (with Teredo), documentation, and 6to4, which hides an IPv4 address.
const RESERVED_V6: &[(Ipv6Addr, u32)] = &[
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

/// All that is routed: whatever else there is (loopback, mapped and translated IPv4, unique local, link-local, multicast)
/// lies outside.
const GLOBAL_V6: (Ipv6Addr, u32) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);

/// Whether an address is of the public Internet.
pub(crate) fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => !RESERVED_V4.iter().any(|range| in_v4(v4, *range)),
        IpAddr::V6(v6) => in_v6(v6, GLOBAL_V6) && !RESERVED_V6.iter().any(|range| in_v6(v6, *range)),
    }
}

fn in_v4(address: Ipv4Addr, (begin, bits): (Ipv4Addr, u32)) -> bool {
    let differs = address.to_bits() ^ begin.to_bits();
    differs.leading_zeros() >= bits
}

fn in_v6(address: Ipv6Addr, (begin, bits): (Ipv6Addr, u32)) -> bool {
    let differs = address.to_bits() ^ begin.to_bits();
    differs.leading_zeros() >= bits
}

/// Addresses with a common beginning: `10.1.0.0/16`, `fd00:1::/32`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AddressRange {
    begin: IpAddr,
    bits: u32,
}

/// No range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("address range {0:?}: expected an address like \"10.1.0.0/16\" or \"fd00::1\"")]
pub struct AddressRangeError(String);

impl AddressRange {
    /// Whether an address lies in it. An IPv4 address within an IPv6 one is the IPv4 address.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        match (self.begin, address.to_canonical()) {
            (IpAddr::V4(begin), IpAddr::V4(v4)) => in_v4(v4, (begin, self.bits)),
            (IpAddr::V6(begin), IpAddr::V6(v6)) => in_v6(v6, (begin, self.bits)),
            _ => false,
        }
    }
}

impl FromStr for AddressRange {
    type Err = AddressRangeError;

    fn from_str(text: &str) -> Result<Self, AddressRangeError> {
        let wrong = || AddressRangeError(text.chars().take(100).collect());
        let (begin, bits) = match text.split_once('/') {
            None => (text, None),
            Some((begin, bits)) => (begin, Some(bits)),
        };
        let begin: IpAddr = begin.parse().map_err(|_| wrong())?;
        let bits_max = if begin.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(bits_max), |bits| bits.parse().map_err(|_| wrong()))?;
        if bits > bits_max {
            return Err(wrong());
        }
        Ok(Self { begin, bits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn the_public_internet_is_reached() {
        for text in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.167.1.1",
            "198.17.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a01:e0a::1",
            "::ffff:1.1.1.1",
        ] {
            assert!(is_public(ip(text)), "{text}");
        }
    }

    #[test]
    fn nothing_else_is() {
        for text in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.255.255",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.192",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
            "100.100.100.200",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::a00:1",
            "fd00:ec2::254",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "2001::1",
            "2001:db8::1",
            "2002:a00:1::",
            "3fff::1",
            "fec0::1",
            "100::1",
        ] {
            assert!(!is_public(ip(text)), "{text}");
        }
    }

    #[test]
    fn a_range_contains_what_begins_like_it() {
        let range: AddressRange = "10.1.0.0/16".parse().expect("a range");
        assert!(range.contains(ip("10.1.255.1")) && range.contains(ip("::ffff:10.1.0.9")));
        assert!(!range.contains(ip("10.2.0.1")) && !range.contains(ip("fd00::1")));
        let one: AddressRange = "fd00::1".parse().expect("a range");
        assert!(one.contains(ip("fd00::1")) && !one.contains(ip("fd00::2")));
        let all: AddressRange = "0.0.0.0/0".parse().expect("a range");
        assert!(all.contains(ip("192.168.0.1")));
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "localhost",
            "fd00::/129",
            "10.0.0",
        ] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
    }
}
