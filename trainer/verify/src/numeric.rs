//! Evaluation of expressions in floating point with error bounds, for pairs whose normal forms decide
//! nothing.
//!
//! Two expressions are different if their values at one sample point differ by more than both error bounds.
//! They count as equal if the values agree at several points.
//!
//! Deliberately absent: proofs. The error bounds ignore the truncation error of integrals except for a fixed
//! allowance.

use std::collections::HashMap;

use num_traits::ToPrimitive;

use crate::effort::{spend, spend_on};
use crate::expr::{Constant, Expr, Function, Over};

/// Complex number with an error bound: a disk in the complex plane.
#[derive(Debug, Clone, Copy)]
pub struct Ball {
    /// Real part of the center.
    pub re: f64,
    /// Imaginary part of the center.
    pub im: f64,
    /// Error bound, the radius of the disk.
    pub error: f64,
}

/// Relative rounding error that each operation adds.
const EPSILON: f64 = 4.0 * f64::EPSILON;
/// Largest difference between the limits of a sum or product.
const STEPS: i64 = 400;

impl Ball {
    /// Returns a real number with the rounding error of one operation.
    pub fn real(value: f64) -> Self {
        Self { re: value, im: 0.0, error: value.abs() * EPSILON }
    }

    /// Returns the absolute value of the center.
    fn size(self) -> f64 {
        self.re.hypot(self.im)
    }

    /// Returns a disk with the rounding error added, or `None` if a part is not finite.
    fn new(re: f64, im: f64, error: f64) -> Option<Self> {
        let ball = Self { re, im, error: error + re.hypot(im) * EPSILON };
        (re.is_finite() && im.is_finite() && ball.error.is_finite()).then_some(ball)
    }

    fn plus(self, other: Self) -> Option<Self> {
        Self::new(self.re + other.re, self.im + other.im, self.error + other.error)
    }

    fn times(self, other: Self) -> Option<Self> {
        Self::new(
            self.re * other.re - self.im * other.im,
            self.re * other.im + self.im * other.re,
            self.size() * other.error + other.size() * self.error + self.error * other.error,
        )
    }

    /// Returns the reciprocal, or `None` if the disk is too close to 0.
    fn inverse(self) -> Option<Self> {
        let size = self.size();
        if size <= self.error * 2.0 || size == 0.0 {
            return None;
        }
        let square = size * size;
        Self::new(self.re / square, -self.im / square, self.error / (size * (size - self.error)))
    }

    /// Returns the principal logarithm, or `None` too close to 0 or to the branch cut.
    fn ln(self) -> Option<Self> {
        let size = self.size();
        if size <= self.error * 2.0 || size == 0.0 {
            return None;
        }
        // On the branch cut, the sign of a rounding error would choose the branch.
        if self.re < 0.0 && self.im != 0.0 && self.im.abs() <= self.error {
            return None;
        }
        Self::new(size.ln(), self.im.atan2(self.re), self.error / (size - self.error))
    }

    fn exp(self) -> Option<Self> {
        let size = self.re.exp();
        Self::new(size * self.im.cos(), size * self.im.sin(), size * (self.error.exp() - 1.0).max(self.error))
    }

    /// Returns the power: by multiplication for integers up to 512, as a real odd root, or else by logarithm.
    fn power(self, exponent: Self) -> Option<Self> {
        if exponent.im == 0.0
            && exponent.re.fract() == 0.0
            && exponent.re.abs() <= 512.0
            && exponent.error < 1e-9
        {
            spend(exponent.re.abs() as u64 * 16)?;
            let mut result = Self { re: 1.0, im: 0.0, error: 0.0 };
            for _ in 0..exponent.re.abs() as u32 {
                result = result.times(self)?;
            }
            return if exponent.re < 0.0 { result.inverse() } else { Some(result) };
        }
        if self.size() == 0.0 {
            return (exponent.re > 0.0).then_some(self);
        }
        // Odd roots of negative numbers are real, as answers in school mathematics mean them.
        if self.im == 0.0 && self.re < 0.0 && exponent.im == 0.0 {
            let degree = (1.0 / exponent.re).round();
            if degree.rem_euclid(2.0) == 1.0 && (exponent.re * degree - 1.0).abs() < 1e-12 {
                let root = Self { re: -self.re, ..self }.power(exponent)?;
                return Some(Self { re: -root.re, ..root });
            }
        }
        self.ln()?.times(exponent)?.exp()
    }

    /// Returns whether the imaginary part is within the error bound.
    fn is_real(self) -> bool {
        self.im.abs() <= self.error
    }
}

/// Values of the variables at a sample point, by name.
pub type Place = HashMap<String, Ball>;

/// Evaluates an expression at a sample point. Returns `None` if the value is undefined or unreliable.
pub fn value(expr: &Expr, place: &Place) -> Option<Ball> {
    spend(120)?;
    match expr {
        Expr::Number(number) => {
            spend_on(&number.value, &number.value)?;
            let value = number.value.to_f64()?;
            Ball::new(value, 0.0, 0.0)
        }
        Expr::Symbol(name) => place.get(name).copied(),
        Expr::Constant(Constant::Pi) => Some(Ball::real(std::f64::consts::PI)),
        Expr::Constant(Constant::E) => Some(Ball::real(std::f64::consts::E)),
        Expr::Constant(Constant::I) => Some(Ball { re: 0.0, im: 1.0, error: 0.0 }),
        Expr::Sum(terms) => terms
            .iter()
            .try_fold(Ball { re: 0.0, im: 0.0, error: 0.0 }, |sum, term| sum.plus(value(term, place)?)),
        Expr::Product(factors) => {
            factors.iter().try_fold(Ball { re: 1.0, im: 0.0, error: 0.0 }, |product, factor| {
                product.times(value(factor, place)?)
            })
        }
        Expr::Power(base, exponent) => value(base, place)?.power(value(exponent, place)?),
        Expr::Percent(inner) => value(inner, place)?.times(Ball::real(0.01)),
        Expr::Degrees(inner) => value(inner, place)?.times(Ball::real(std::f64::consts::PI / 180.0)),
        Expr::Ratio(parts) => match parts.as_slice() {
            [a, b] => value(a, place)?.times(value(b, place)?.inverse()?),
            _ => None,
        },
        Expr::Call(function, arguments) => {
            let arguments: Option<Vec<Ball>> =
                arguments.iter().map(|argument| value(argument, place)).collect();
            call(*function, &arguments?)
        }
        Expr::Over(over, index, parts) => run(*over, index, parts, place),
        _ => None,
    }
}

/// Evaluates a function of one argument.
fn call(function: Function, arguments: &[Ball]) -> Option<Ball> {
    let [z] = arguments else { return several(function, arguments) };
    let z = *z;
    let real = |value: f64, slope: f64| {
        if z.is_real() { Ball::new(value, 0.0, z.error * slope.abs()) } else { None }
    };
    let x = z.re;
    match function {
        Function::Ln => z.ln(),
        Function::Abs => Ball::new(z.size(), 0.0, z.error),
        Function::Sin => {
            Ball::new(x.sin() * z.im.cosh(), x.cos() * z.im.sinh(), z.error * z.im.cosh() + x.abs() * EPSILON)
        }
        Function::Cos => Ball::new(
            x.cos() * z.im.cosh(),
            -x.sin() * z.im.sinh(),
            z.error * z.im.cosh() + x.abs() * EPSILON,
        ),
        Function::Tan => call(Function::Sin, arguments)?.times(call(Function::Cos, arguments)?.inverse()?),
        Function::Cot => call(Function::Cos, arguments)?.times(call(Function::Sin, arguments)?.inverse()?),
        Function::Sec => call(Function::Cos, arguments)?.inverse(),
        Function::Csc => call(Function::Sin, arguments)?.inverse(),
        Function::Arcsin | Function::Arccos => {
            if x.abs() > 1.0 {
                return None;
            }
            let slope = 1.0 / (1.0 - x * x).sqrt().max(1e-8);
            real(if function == Function::Arcsin { x.asin() } else { x.acos() }, slope)
        }
        Function::Arctan => real(x.atan(), 1.0),
        Function::Sinh => real(x.sinh(), x.cosh()),
        Function::Cosh => real(x.cosh(), x.sinh()),
        Function::Tanh => real(x.tanh(), 1.0),
        Function::Floor | Function::Ceil => {
            // Near an integer the rounding error decides between two results.
            let near = (x - x.round()).abs() <= z.error && z.error > 0.0 && x.fract() != 0.0;
            if near || !z.is_real() {
                return None;
            }
            Ball::new(if function == Function::Floor { x.floor() } else { x.ceil() }, 0.0, 0.0)
        }
        Function::Factorial => {
            if !z.is_real() || x < 0.0 || x.fract() != 0.0 || x > 170.0 {
                return None;
            }
            Ball::new((1..=x as u32).map(f64::from).product(), 0.0, 0.0)
        }
        Function::Max | Function::Min => Some(z),
        Function::Binomial | Function::Gcd | Function::Lcm => None,
    }
}

/// Evaluates a function of several arguments.
fn several(function: Function, arguments: &[Ball]) -> Option<Ball> {
    let real = arguments.iter().all(|ball| ball.is_real());
    match (function, arguments) {
        (Function::Max, all) if real => all.iter().copied().max_by(|a, b| a.re.total_cmp(&b.re)),
        (Function::Min, all) if real => all.iter().copied().min_by(|a, b| a.re.total_cmp(&b.re)),
        (Function::Binomial, [n, k]) if real && k.re.fract() == 0.0 && (0.0..=170.0).contains(&k.re) => {
            let mut product = Ball::real(1.0);
            for step in 0..k.re as u32 {
                let step = f64::from(step);
                let factor = Ball::new((n.re - step) / (step + 1.0), 0.0, n.error)?;
                product = product.times(factor)?;
            }
            Some(product)
        }
        _ => None,
    }
}

/// Evaluates a sum, a product or an integral.
fn run(over: Over, index: &str, parts: &[Expr; 3], place: &Place) -> Option<Ball> {
    let (low, high) = (value(&parts[0], place)?, value(&parts[1], place)?);
    let mut inner = place.clone();
    let mut at = |x: f64| {
        inner.insert(index.to_owned(), Ball { re: x, im: 0.0, error: 0.0 });
        value(&parts[2], &inner)
    };
    if over == Over::Integral {
        // Nodes and weights of Gauss-Legendre quadrature with five points, applied to each of 64 pieces.
        const NODES: [(f64, f64); 5] = [
            (0.0, 0.568_888_888_888_888_9),
            (0.538_469_310_105_683, 0.478_628_670_499_366_47),
            (-0.538_469_310_105_683, 0.478_628_670_499_366_47),
            (0.906_179_845_938_664, 0.236_926_885_056_189_08),
            (-0.906_179_845_938_664, 0.236_926_885_056_189_08),
        ];
        let step = (high.re - low.re) / 64.0;
        let mut sum = Ball { re: 0.0, im: 0.0, error: 0.0 };
        for piece in 0..64 {
            let middle = low.re + step * (f64::from(piece) + 0.5);
            for (node, weight) in NODES {
                sum = sum.plus(at(middle + node * step / 2.0)?.times(Ball::real(weight * step / 2.0))?)?;
            }
        }
        // Allowance for the error of the quadrature, which is far smaller for smooth integrands.
        return Ball::new(sum.re, sum.im, sum.error + sum.size() * 1e-10);
    }
    let (low, high) = (low.re, high.re);
    if low.fract() != 0.0 || high.fract() != 0.0 || high - low > STEPS as f64 {
        return None;
    }
    let mut all = Ball { re: if over == Over::Sum { 0.0 } else { 1.0 }, im: 0.0, error: 0.0 };
    for k in low as i64..=high as i64 {
        let term = at(k as f64)?;
        all = if over == Over::Sum { all.plus(term)? } else { all.times(term)? };
    }
    Some(all)
}
