//! Addresses of nodes, and the policy that restricts them. A request body never chooses a destination. Nodes of the
//! admin API are checked after name resolution, at every connection, which prevents DNS rebinding.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::Uri;
use http::uri::Authority;

/// Parsed base URL of a node.
#[derive(Debug, Clone)]
pub struct NodeUrl {
    /// Whether the scheme is `https`.
    pub tls: bool,
    /// Host and port as configured, for the `host` header and for logs.
    pub authority: Authority,
    /// Host without brackets.
    pub host: String,
    /// Port, or the default port of the scheme.
    pub port: u16,
    /// Path before `/v1`, without a trailing slash.
    pub prefix: String,
}

/// Restriction of the addresses that a node may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressPolicy {
    /// Any address: the node is in the configuration.
    Trusted,
    /// The node was added by the admin API. Metadata services, link-local addresses and addresses that are not unicast
    /// hosts are rejected.
    Restricted {
        /// Whether loopback and private addresses are permitted.
        allow_private: bool,
    },
}

/// Parses the base URL of a node. Rejects other schemes than HTTP, user names, queries, and a path that ends in `/v1`.
pub fn parse_url(url: &str) -> Result<NodeUrl, String> {
    let uri: Uri = url.parse().map_err(|error| format!("`url` is not a URL: {error}"))?;
    let tls = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err("`url` must begin with `http://` or `https://`".to_owned()),
    };
    let authority = uri.authority().cloned().ok_or_else(|| "`url` names no host".to_owned())?;
    if authority.as_str().contains('@') {
        return Err("`url` must not hold a user name; use `api_key_env`".to_owned());
    }
    if uri.query().is_some() {
        return Err("`url` must not have a query".to_owned());
    }
    let prefix = uri.path().trim_end_matches('/').to_owned();
    if prefix.ends_with("/v1") {
        return Err("`url` must not end in `/v1`".to_owned());
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
    if host.is_empty() {
        return Err("`url` names no host".to_owned());
    }
    let port = match authority.as_str().rsplit_once(':') {
        Some((_, text)) if !text.contains(']') => {
            authority.port_u16().filter(|port| *port > 0).ok_or_else(|| format!("`{text}` is not a port"))?
        }
        _ if tls => 443,
        _ => 80,
    };
    Ok(NodeUrl { tls, authority, host, port, prefix })
}

/// Returns whether `policy` permits `address`.
pub fn is_allowed(address: IpAddr, policy: AddressPolicy) -> bool {
    let AddressPolicy::Restricted { allow_private } = policy else { return true };
    match address {
        IpAddr::V4(v4) => is_v4_allowed(v4, allow_private),
        IpAddr::V6(v6) => match embedded_ipv4(v6) {
            Some(v4) => is_v4_allowed(v4, allow_private),
            None => is_v6_allowed(v6, allow_private),
        },
    }
}

/// Returns the IPv4 address that an IPv6 address embeds: mapped or compatible (RFC 4291), translated (RFC 6052) or 6to4
/// (RFC 3056).
fn embedded_ipv4(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let part = address.segments();
    let tail = |high: u16, low: u16| Ipv4Addr::from((u32::from(high) << 16) | u32::from(low));
    match part {
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some(tail(high, low)),
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 => Some(tail(high, low)),
        [0x2002, high, low, ..] => Some(tail(high, low)),
        _ => None,
    }
}

fn is_v4_allowed(address: Ipv4Addr, allow_private: bool) -> bool {
    let [a, b, c, _] = address.octets();
    let never = a == 0
        || address.is_link_local()
        || address.is_multicast()
        || address.is_broadcast()
        || a >= 240
        // Metadata services of Alibaba and Oracle, outside the link-local range.
        || address == Ipv4Addr::new(100, 100, 100, 200)
        || address == Ipv4Addr::new(192, 0, 0, 192)
        || (a, b, c) == (192, 0, 2)
        || (a, b, c) == (198, 51, 100)
        || (a, b, c) == (203, 0, 113);
    let private = address.is_loopback()
        || address.is_private()
        || (a == 100 && (64..128).contains(&b))
        || (a == 198 && (18..20).contains(&b));
    !never && (allow_private || !private)
}

fn is_v6_allowed(address: Ipv6Addr, allow_private: bool) -> bool {
    let first = address.segments()[0];
    let never = address.is_unspecified()
        || address.is_multicast()
        || (first & 0xffc0) == 0xfe80
        || (first & 0xffc0) == 0xfec0
        // Metadata service of AWS.
        || address == Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    let private = address.is_loopback() || (first & 0xfe00) == 0xfc00;
    !never && (allow_private || !private)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_url_rejects_invalid_urls() {
        for (url, problem) in [
            ("ftp://x", "http://"),
            ("file:///etc/passwd", "`url`"),
            ("http://u:p@x", "user name"),
            ("http://x/v1", "/v1"),
            ("http://x/?a=b", "query"),
            ("http://x:0", "port"),
            ("http://x:99999", "`url`"),
            ("x", "http://"),
        ] {
            let found = parse_url(url).unwrap_err();
            assert!(found.contains(problem) || found.contains("port"), "{url}: {found}");
        }
        let node = parse_url("http://h:1/base/").unwrap();
        assert_eq!((node.host.as_str(), node.port, node.prefix.as_str(), node.tls), ("h", 1, "/base", false));
        let node = parse_url("https://[2001:db8::1]").unwrap();
        assert_eq!((node.host.as_str(), node.port, node.tls), ("2001:db8::1", 443, true));
    }

    #[test]
    fn policy_rejects_special_addresses() {
        let added = |allow_private| AddressPolicy::Restricted { allow_private };
        let never = [
            "169.254.169.254",
            "169.254.0.1",
            "169.254.170.2",
            "0.0.0.0",
            "0.1.2.3",
            "255.255.255.255",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "100.100.100.200",
            "192.0.0.192",
            "192.0.2.1",
            "198.51.100.7",
            "203.0.113.9",
            "::",
            "fe80::1",
            "fe80::a9fe:a9fe",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "ff0e::1",
            "fd00:ec2::254",
            "::ffff:169.254.169.254",
            "::ffff:0.0.0.0",
            "::ffff:a9fe:a9fe",
            "64:ff9b::169.254.169.254",
            "2002:a9fe:a9fe::1",
            "::169.254.169.254",
            "::ffff:224.0.0.1",
        ];
        let private = [
            "127.0.0.1",
            "127.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "172.16.0.1",
            "172.31.9.9",
            "192.168.1.1",
            "100.64.0.1",
            "100.127.0.1",
            "198.18.0.1",
            "::1",
            "fc00::1",
            "fd12:3456::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "2002:7f00:1::",
            "::ffff:192.168.0.1",
        ];
        let fine =
            ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8", "192.169.0.1"];
        let parse = |text: &str| text.parse::<IpAddr>().unwrap();
        for text in never {
            assert!(
                !is_allowed(parse(text), added(true)) && !is_allowed(parse(text), added(false)),
                "{text}"
            );
            assert!(is_allowed(parse(text), AddressPolicy::Trusted));
        }
        for text in private {
            assert!(is_allowed(parse(text), added(true)) && !is_allowed(parse(text), added(false)), "{text}");
        }
        for text in fine {
            assert!(is_allowed(parse(text), added(true)) && is_allowed(parse(text), added(false)), "{text}");
        }
        assert!(never.len() + private.len() >= 40);
    }

    #[test]
    fn numeric_hosts_do_not_parse_as_addresses() {
        // These spellings do not parse as addresses, so they are resolved by name and checked afterwards. A resolver
        // can map them to 127.0.0.1 or 169.254.169.254.
        for text in
            ["0x7f.1", "017700000001", "2130706433", "0x7f000001", "127.1", "0xa9fea9fe", "2852039166"]
        {
            assert!(text.parse::<IpAddr>().is_err(), "{text}");
        }
    }
}
