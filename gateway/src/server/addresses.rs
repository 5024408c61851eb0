//! Counts the open connections of each client address.

use std::net::IpAddr;
use std::sync::Arc;

use dashmap::DashMap;

/// Open connections by address. An address without connections has no entry.
#[derive(Clone, Default)]
pub struct AddressCounts(Arc<DashMap<IpAddr, usize>>);

/// One counted connection. Dropping it removes it from the count.
pub struct CountedConnection {
    addresses: AddressCounts,
    address: IpAddr,
}

impl AddressCounts {
    /// Counts a connection, or returns `None` if the address has `most` already.
    pub fn count_connection(&self, address: IpAddr, most: usize) -> Option<CountedConnection> {
        let mut count = self.0.entry(address).or_insert(0);
        if *count >= most {
            return None;
        }
        *count += 1;
        Some(CountedConnection { addresses: self.clone(), address })
    }
}

impl Drop for CountedConnection {
    fn drop(&mut self) {
        let left = self.addresses.0.get_mut(&self.address).map(|mut count| {
            *count -= 1;
            *count
        });
        if left == Some(0) {
            self.addresses.0.remove_if(&self.address, |_, count| *count == 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_connections_per_address() {
        let addresses = AddressCounts::default();
        let here: IpAddr = [127, 0, 0, 1].into();
        let (a, b) =
            (addresses.count_connection(here, 2).unwrap(), addresses.count_connection(here, 2).unwrap());
        assert!(addresses.count_connection(here, 2).is_none());
        assert!(addresses.count_connection([127, 0, 0, 2].into(), 2).is_some());
        drop(a);
        let c = addresses.count_connection(here, 2).unwrap();
        drop((b, c));
        assert!(addresses.0.is_empty());
    }
}
