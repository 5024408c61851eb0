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

use crate::effort::{spend, spend_fractions};
use crate::expr::{BigOperator, Constant, Expr, Function};

/// Complex number with an error bound: a disk in the complex plane.
#[derive(Debug, Clone, Copy)]
pub struct ComplexInterval {
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
const MAX_TERMS: i64 = 400;

impl ComplexInterval {
    /// Returns a real number with the rounding error of one operation.
    pub fn real(value: f64) -> Self {
        Self { re: value, im: 0.0, error: value.abs() * EPSILON }
    }

    /// Returns the absolute value of the center.
    fn magnitude(self) -> f64 {
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
            self.magnitude() * other.error + other.magnitude() * self.error + self.error * other.error,
        )
    }

    /// Returns the reciprocal, or `None` if the disk is too close to 0.
    fn reciprocal(self) -> Option<Self> {
        let size = self.magnitude();
        if size <= self.error * 2.0 || size == 0.0 {
            return None;
        }
        let square = size * size;
        Self::new(self.re / square, -self.im / square, self.error / (size * (size - self.error)))
    }

    /// Returns the principal logarithm, or `None` too close to 0 or to the branch cut.
    fn ln(self) -> Option<Self> {
        let size = self.magnitude();
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
            return if exponent.re < 0.0 { result.reciprocal() } else { Some(result) };
        }
        if self.magnitude() == 0.0 {
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
pub type SamplePoint = HashMap<String, ComplexInterval>;

/// Evaluates an expression at a sample point. Returns `None` if the value is undefined or unreliable.
pub fn evaluate(expr: &Expr, place: &SamplePoint) -> Option<ComplexInterval> {
    spend(120)?;
    match expr {
        Expr::Number(number) => {
            spend_fractions(&number.value, &number.value)?;
            let value = number.value.to_f64()?;
            ComplexInterval::new(value, 0.0, 0.0)
        }
        Expr::Symbol(name) => place.get(name).copied(),
        Expr::Constant(Constant::Pi) => Some(ComplexInterval::real(std::f64::consts::PI)),
        Expr::Constant(Constant::E) => Some(ComplexInterval::real(std::f64::consts::E)),
        Expr::Constant(Constant::I) => Some(ComplexInterval { re: 0.0, im: 1.0, error: 0.0 }),
        Expr::Sum(terms) => {
            terms.iter().try_fold(ComplexInterval { re: 0.0, im: 0.0, error: 0.0 }, |sum, term| {
                sum.plus(evaluate(term, place)?)
            })
        }
        Expr::Product(factors) => {
            factors.iter().try_fold(ComplexInterval { re: 1.0, im: 0.0, error: 0.0 }, |product, factor| {
                product.times(evaluate(factor, place)?)
            })
        }
        Expr::Power(base, exponent) => evaluate(base, place)?.power(evaluate(exponent, place)?),
        Expr::Percent(inner) => evaluate(inner, place)?.times(ComplexInterval::real(0.01)),
        Expr::Degrees(inner) => {
            evaluate(inner, place)?.times(ComplexInterval::real(std::f64::consts::PI / 180.0))
        }
        Expr::Ratio(parts) => match parts.as_slice() {
            [a, b] => evaluate(a, place)?.times(evaluate(b, place)?.reciprocal()?),
            _ => None,
        },
        Expr::Call(function, arguments) => {
            let arguments: Option<Vec<ComplexInterval>> =
                arguments.iter().map(|argument| evaluate(argument, place)).collect();
            evaluate_call(*function, &arguments?)
        }
        Expr::BigOperator(over, index, parts) => evaluate_big_operator(*over, index, parts, place),
        _ => None,
    }
}

/// Evaluates a function of one argument.
fn evaluate_call(function: Function, arguments: &[ComplexInterval]) -> Option<ComplexInterval> {
    let [z] = arguments else { return evaluate_multi_argument(function, arguments) };
    let z = *z;
    let real = |value: f64, slope: f64| {
        if z.is_real() { ComplexInterval::new(value, 0.0, z.error * slope.abs()) } else { None }
    };
    let x = z.re;
    match function {
        Function::Ln => z.ln(),
        Function::Abs => ComplexInterval::new(z.magnitude(), 0.0, z.error),
        Function::Sin => ComplexInterval::new(
            x.sin() * z.im.cosh(),
            x.cos() * z.im.sinh(),
            z.error * z.im.cosh() + x.abs() * EPSILON,
        ),
        Function::Cos => ComplexInterval::new(
            x.cos() * z.im.cosh(),
            -x.sin() * z.im.sinh(),
            z.error * z.im.cosh() + x.abs() * EPSILON,
        ),
        Function::Tan => evaluate_call(Function::Sin, arguments)?
            .times(evaluate_call(Function::Cos, arguments)?.reciprocal()?),
        Function::Cot => evaluate_call(Function::Cos, arguments)?
            .times(evaluate_call(Function::Sin, arguments)?.reciprocal()?),
        Function::Sec => evaluate_call(Function::Cos, arguments)?.reciprocal(),
        Function::Csc => evaluate_call(Function::Sin, arguments)?.reciprocal(),
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
            ComplexInterval::new(if function == Function::Floor { x.floor() } else { x.ceil() }, 0.0, 0.0)
        }
        Function::Factorial => {
            if !z.is_real() || x < 0.0 || x.fract() != 0.0 || x > 170.0 {
                return None;
            }
            ComplexInterval::new((1..=x as u32).map(f64::from).product(), 0.0, 0.0)
        }
        Function::Max | Function::Min => Some(z),
        Function::Binomial | Function::Gcd | Function::Lcm => None,
    }
}

/// Evaluates a function of several arguments.
fn evaluate_multi_argument(function: Function, arguments: &[ComplexInterval]) -> Option<ComplexInterval> {
    let real = arguments.iter().all(|ball| ball.is_real());
    match (function, arguments) {
        (Function::Max, all) if real => all.iter().copied().max_by(|a, b| a.re.total_cmp(&b.re)),
        (Function::Min, all) if real => all.iter().copied().min_by(|a, b| a.re.total_cmp(&b.re)),
        (Function::Binomial, [n, k]) if real && k.re.fract() == 0.0 && (0.0..=170.0).contains(&k.re) => {
            let mut product = ComplexInterval::real(1.0);
            for step in 0..k.re as u32 {
                let step = f64::from(step);
                let factor = ComplexInterval::new((n.re - step) / (step + 1.0), 0.0, n.error)?;
                product = product.times(factor)?;
            }
            Some(product)
        }
        _ => None,
    }
}

/// Evaluates a sum, a product or an integral.
fn evaluate_big_operator(
    over: BigOperator,
    index: &str,
    parts: &[Expr; 3],
    place: &SamplePoint,
) -> Option<ComplexInterval> {
    let (low, high) = (evaluate(&parts[0], place)?, evaluate(&parts[1], place)?);
    let mut inner = place.clone();
    let mut at = |x: f64| {
        inner.insert(index.to_owned(), ComplexInterval { re: x, im: 0.0, error: 0.0 });
        evaluate(&parts[2], &inner)
    };
    if over == BigOperator::Integral {
        // Nodes and weights of Gauss-Legendre quadrature with five points, applied to each of 64 pieces.
        const NODES: [(f64, f64); 5] = [
            (0.0, 0.568_888_888_888_888_9),
            (0.538_469_310_105_683, 0.478_628_670_499_366_47),
            (-0.538_469_310_105_683, 0.478_628_670_499_366_47),
            (0.906_179_845_938_664, 0.236_926_885_056_189_08),
            (-0.906_179_845_938_664, 0.236_926_885_056_189_08),
        ];
        let step = (high.re - low.re) / 64.0;
        let mut sum = ComplexInterval { re: 0.0, im: 0.0, error: 0.0 };
        for piece in 0..64 {
            let middle = low.re + step * (f64::from(piece) + 0.5);
            for (node, weight) in NODES {
                sum = sum.plus(
                    at(middle + node * step / 2.0)?.times(ComplexInterval::real(weight * step / 2.0))?,
                )?;
            }
        }
        // Allowance for the error of the quadrature, which is far smaller for smooth integrands.
        return ComplexInterval::new(sum.re, sum.im, sum.error + sum.magnitude() * 1e-10);
    }
    let (low, high) = (low.re, high.re);
    if low.fract() != 0.0 || high.fract() != 0.0 || high - low > MAX_TERMS as f64 {
        return None;
    }
    let mut all =
        ComplexInterval { re: if over == BigOperator::Sum { 0.0 } else { 1.0 }, im: 0.0, error: 0.0 };
    for k in low as i64..=high as i64 {
        let term = at(k as f64)?;
        all = if over == BigOperator::Sum { all.plus(term)? } else { all.times(term)? };
    }
    Some(all)
}
