//! Rate limits of a key or of one of its stages: requests per minute (crate `governor`), tokens per minute by
//! reservation and settlement, and concurrent requests.

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::{BufMut, BytesMut};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::config::KeyLimits;
use crate::error::GatewayError;

type RequestLimiter = RateLimiter<NotKeyed, InMemoryState, DefaultClock, StateInformationMiddleware>;

/// Counters of a key or stage for its configured limits.
pub struct KeyLimiter {
    limits: KeyLimits,
    requests: Option<(RequestLimiter, AtomicU32)>,
    tokens: Option<Mutex<TokenBucket>>,
    concurrency: Option<Arc<Semaphore>>,
    epoch: Instant,
}

/// Token bucket for tokens per minute. A reservation takes the expected number of tokens. Settlement corrects this
/// number when the request has ended. The level may become negative; then refilling repays the debt first. Pure: the
/// time is an argument, in seconds.
#[derive(Debug)]
pub struct TokenBucket {
    per_minute: f64,
    level: f64,
    refilled_at_s: f64,
}

impl TokenBucket {
    /// Creates a full bucket of `per_minute` tokens.
    pub fn new(per_minute: u64) -> Self {
        Self { per_minute: per_minute as f64, level: per_minute as f64, refilled_at_s: 0.0 }
    }

    fn refill(&mut self, now: f64) {
        // A clock that goes back refills nothing and takes nothing.
        let earned = (now - self.refilled_at_s).max(0.0) * self.per_minute / 60.0;
        self.level = (self.level + earned).min(self.per_minute);
        self.refilled_at_s = now;
    }

    /// Takes `tokens` from the bucket. Returns the seconds until enough tokens are available as an error. A request
    /// larger than the bucket is admitted when the bucket is full, and leaves a debt.
    pub fn reserve(&mut self, tokens: u64, now: f64) -> Result<(), f64> {
        self.refill(now);
        let needed = (tokens as f64).min(self.per_minute);
        if self.level + 1e-9 >= needed {
            self.level -= tokens as f64;
            return Ok(());
        }
        Err((needed - self.level) * 60.0 / self.per_minute)
    }

    /// Replaces the `reserved` tokens of a request by the `used` ones.
    pub fn settle(&mut self, reserved: u64, used: u64) {
        self.level = (self.level + reserved as f64 - used as f64).min(self.per_minute);
    }

    /// Returns the tokens that are available at `now`.
    pub fn remaining(&mut self, now: f64) -> u64 {
        self.refill(now);
        self.level.max(0.0) as u64
    }
}

impl KeyLimiter {
    /// Creates counters at their limits: all buckets are full.
    pub fn new(limits: &KeyLimits) -> Self {
        let quota = limits.requests_per_minute.and_then(NonZeroU32::new);
        Self {
            requests: quota.map(|quota| {
                let limiter = RateLimiter::direct(Quota::per_minute(quota));
                (limiter.with_middleware::<StateInformationMiddleware>(), AtomicU32::new(quota.get()))
            }),
            tokens: limits.tokens_per_minute.map(TokenBucket::new).map(Mutex::new),
            concurrency: limits.concurrency.map(|most| Arc::new(Semaphore::new(most))),
            limits: limits.clone(),
            epoch: Instant::now(),
        }
    }

    fn now_s(&self) -> f64 {
        self.epoch.elapsed().as_secs_f64()
    }

    /// Counts a request. Returns [`GatewayError::RateLimited`] if no request is left in this minute.
    pub fn take_request(&self) -> Result<(), GatewayError> {
        let Some((limiter, remaining)) = &self.requests else { return Ok(()) };
        match limiter.check() {
            Ok(state) => {
                remaining.store(state.remaining_burst_capacity(), Ordering::Relaxed);
                Ok(())
            }
            Err(until) => {
                remaining.store(0, Ordering::Relaxed);
                let wait = until.wait_time_from(DefaultClock::default().now());
                Err(GatewayError::RateLimited {
                    what: "requests per minute",
                    retry_after: wait.as_secs() + 1,
                })
            }
        }
    }

    fn lock_tokens(&self) -> Option<MutexGuard<'_, TokenBucket>> {
        self.tokens.as_ref().map(|bucket| bucket.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes OpenAI's `x-ratelimit-limit-*`, `x-ratelimit-remaining-*` and `x-ratelimit-reset-*` headers.
    pub fn write_headers(&self, headers: &mut HeaderMap) {
        let mut three = |names: &[HeaderName; 3], limit: u64, left: u64| {
            // Whole seconds until the limit is fully available again.
            let reset = limit.saturating_sub(left) * 60 / limit.max(1);
            // One allocation for all three values.
            let mut text = BytesMut::with_capacity(64);
            write_decimal(&mut text, limit);
            let first = text.len();
            write_decimal(&mut text, left);
            let second = text.len();
            write_decimal(&mut text, reset);
            text.put_u8(b's');
            let text = text.freeze();
            let pieces = [text.slice(..first), text.slice(first..second), text.slice(second..)];
            for (name, piece) in names.iter().zip(pieces) {
                if let Ok(value) = HeaderValue::from_maybe_shared(piece) {
                    headers.insert(name, value);
                }
            }
        };
        if let (Some(limit), Some((_, left))) = (self.limits.requests_per_minute, &self.requests) {
            three(&REQUEST_HEADERS, limit.into(), left.load(Ordering::Relaxed).into());
        }
        if let (Some(limit), Some(left)) = (
            self.limits.tokens_per_minute,
            self.lock_tokens().map(|mut bucket| bucket.remaining(self.now_s())),
        ) {
            three(&TOKEN_HEADERS, limit, left);
        }
    }
}

/// Appends `number` in decimal.
fn write_decimal(text: &mut BytesMut, mut number: u64) {
    let mut digits = [0; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    text.extend_from_slice(&digits[at..]);
}

const REQUEST_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];

const TOKEN_HEADERS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// Tokens and concurrent requests that a request holds. Dropping the reservation frees the concurrent requests and
/// settles the tokens; without [`settle`](Self::settle) all tokens are returned.
pub struct Reservation {
    tokens: u64,
    used_tokens: u64,
    limiters: Vec<Arc<KeyLimiter>>,
    permits: Vec<OwnedSemaphorePermit>,
}

impl Reservation {
    /// Creates a reservation of `tokens` that holds nothing yet.
    pub fn new(tokens: u64) -> Self {
        Self { tokens, used_tokens: 0, limiters: Vec::new(), permits: Vec::new() }
    }

    /// Reserves at `limiter`. Returns [`GatewayError::RateLimited`] if the limit is reached; dropping the reservation
    /// then releases what other limiters granted.
    pub fn reserve_at(&mut self, limiter: &Arc<KeyLimiter>) -> Result<(), GatewayError> {
        if let Some(places) = &limiter.concurrency {
            let place = Arc::clone(places).try_acquire_owned();
            let refused = |_| GatewayError::RateLimited { what: "requests at once", retry_after: 1 };
            self.permits.push(place.map_err(refused)?);
        }
        match limiter.lock_tokens().map(|mut bucket| bucket.reserve(self.tokens, limiter.now_s())) {
            None => {}
            Some(Ok(())) => self.limiters.push(Arc::clone(limiter)),
            Some(Err(seconds)) => {
                return Err(GatewayError::RateLimited {
                    what: "tokens per minute",
                    retry_after: seconds.ceil() as u64,
                });
            }
        }
        Ok(())
    }

    /// Sets the number of tokens that the request used.
    pub fn settle(&mut self, used: u64) {
        self.used_tokens = used;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        for limiter in &self.limiters {
            if let Some(mut bucket) = limiter.lock_tokens() {
                bucket.settle(self.tokens, self.used_tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn settling_returns_unused_tokens() {
        let limits =
            KeyLimits { tokens_per_minute: Some(1_000), concurrency: Some(2), ..KeyLimits::default() };
        let limiter = Arc::new(KeyLimiter::new(&limits));
        let hold = |tokens| {
            let mut reservation = Reservation::new(tokens);
            reservation.reserve_at(&limiter).map(|()| reservation)
        };
        let mut first = hold(900).ok().unwrap();
        assert!(matches!(
            hold(200),
            Err(GatewayError::RateLimited { what: "tokens per minute", retry_after: 1..=6 })
        ));
        first.settle(100);
        drop(first);
        let (_a, _b) = (hold(10).ok().unwrap(), hold(10).ok().unwrap());
        assert!(matches!(hold(10), Err(GatewayError::RateLimited { what: "requests at once", .. })));
    }

    proptest! {
        #[test]
        fn decimal_equals_to_string(number: u64) {
            let mut text = BytesMut::new();
            write_decimal(&mut text, number);
            prop_assert_eq!(text, number.to_string());
        }

        #[test]
        fn token_use_never_exceeds_the_rate_and_one_bucket(
            requests in prop::collection::vec((1u64..400, 0u64..400, 0.0f64..5.0), 1..200),
        ) {
            let mut bucket = TokenBucket::new(1_000);
            let (mut now, mut used) = (0.0, 0u64);
            for (reserved, actual, pause) in requests {
                now += pause;
                if bucket.reserve(reserved, now).is_ok() {
                    // A request that uses at most its reservation: only then does the bound hold.
                    let actual = actual.min(reserved);
                    bucket.settle(reserved, actual);
                    used += actual;
                }
            }
            prop_assert!(used as f64 <= 1_000.0 + now * 1_000.0 / 60.0 + 1.0);
        }

        #[test]
        fn recovers_after_clock_jumps(jumps in prop::collection::vec(-3_600.0f64..3_600.0, 1..20)) {
            let mut bucket = TokenBucket::new(600);
            let mut now = 10_000.0;
            for jump in jumps {
                now += jump;
                let _taken = bucket.reserve(100, now);
                prop_assert!(bucket.reserve(600, now + 120.0).is_ok());
                bucket.settle(600, 0);
                now += 120.0;
            }
        }
    }
}
