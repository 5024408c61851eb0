//! Tests of the verdicts of both profiles, and of the bounds on time and memory for hostile input.
//!
//! Deliberately absent: tests of single modules, which the modules contain.

use proptest::prelude::*;

use super::*;

/// Reference answer, answer and verdict of the strict profile, labeled by hand.
const STRICT: &[(&str, &str, Option<bool>)] = &[
    // Numbers.
    ("17", "17.0", Some(true)),
    ("1234", "1,234", Some(true)),
    ("$1{,}250$", "1250", Some(true)),
    ("10080", "10,\\!080", Some(true)),
    ("1234567", "1 234 567", Some(true)),
    ("1000", "10^3", Some(true)),
    ("1000", "1e3", Some(true)),
    ("0.0015", "1.5 x 10^{-3}", Some(true)),
    ("1500", "1.5 x 10^3", Some(true)),
    ("$6.02\\times10^{23}$", "602000000000000000000000", Some(true)),
    ("0.5", "\\frac{1}{2}", Some(true)),
    ("0.5", ".5", Some(true)),
    ("1\\frac12", "3/2", Some(true)),
    ("1 1/2", "1.5", Some(true)),
    ("33\\frac13\\%", "\\frac13", Some(true)),
    ("0.\\overline{3}", "1/3", Some(true)),
    ("0.1\\overline{6}", "1/6", Some(true)),
    ("-3", "3", Some(false)),
    ("2^{100}", "2^{100}+1", Some(false)),
    ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}", Some(false)),
    ("3^{1000}", "3^{1001}", Some(false)),
    ("100!", "99!\\cdot 100", Some(true)),
    ("340282366920938463463374607431768211457", "340282366920938463463374607431768211456", Some(false)),
    ("2345_6", "2345", Some(false)),
    ("1011_2", "11", Some(true)),
    ("72", "", None),
    // Decimals and rounding.
    ("1/3", "0.333333", Some(true)),
    ("1/3", "0.33", Some(false)),
    ("\\pi", "3.141593", Some(true)),
    ("\\pi", "3.14", Some(false)),
    ("0.0000001", "0.0000002", Some(false)),
    ("\\sqrt2", "1.414214", Some(true)),
    // Percentages, money, units and angles.
    ("50%", "0.5", Some(true)),
    ("50%", "50\\%", Some(true)),
    ("50%", "50", Some(true)),
    ("20%", "0.02", Some(false)),
    ("18", "\\$18", Some(true)),
    ("18", "$18", Some(true)),
    ("72", "72 clips", Some(true)),
    ("5 cm", "5 m", Some(false)),
    ("5\\text{ cm}", "0.05\\text{ m}", Some(true)),
    ("3\\ \\text{hours}", "180\\ \\text{minutes}", Some(true)),
    ("5 kg", "5 litres", Some(false)),
    ("5 apples", "5 pears", None),
    ("12\\text{ m}^2", "12", Some(true)),
    ("5", "5 million", None),
    ("2", "2 dozen", None),
    ("30^\\circ", "30", Some(true)),
    ("30^\\circ", "\\frac{\\pi}{6}", Some(true)),
    ("12:30", "12:45", Some(false)),
    ("12:00", "1:00", Some(false)),
    ("1:2", "2:4", Some(true)),
    ("3:4:5", "6:8:10", Some(true)),
    // Formulas.
    ("\\sqrt8", "2\\sqrt2", Some(true)),
    ("\\frac{1}{\\sqrt2}", "\\frac{\\sqrt2}{2}", Some(true)),
    ("\\sqrt{3+2\\sqrt2}", "1+\\sqrt2", Some(true)),
    ("\\sqrt2\\sqrt3", "\\sqrt6", Some(true)),
    ("\\sqrt[3]{16}", "2\\sqrt[3]{2}", Some(true)),
    ("\\sqrt[3]{-8}", "-2", Some(true)),
    ("x+1", "1+x", Some(true)),
    ("x^2-1", "(x-1)(x+1)", Some(true)),
    ("x^2-1", "(x-1)^2", Some(false)),
    ("\\frac{x^2-1}{x-1}", "x+1", Some(true)),
    ("x_1+x_2", "x_2+x_1", Some(true)),
    ("x_1", "x_2", Some(false)),
    ("X+1", "x+1", None),
    ("\\sin^2x+\\cos^2x", "1", Some(true)),
    ("\\sin(2x)", "2\\sin x\\cos x", Some(true)),
    ("\\cos 60^\\circ", "\\frac12", Some(true)),
    ("\\log_2 8", "3", Some(true)),
    ("\\ln 6", "\\ln 2+\\ln 3", Some(true)),
    ("1-\\frac1e", "1-e^{-1}", Some(true)),
    ("1-\\frac{1}{e}", "1+\\frac{1}{e}", Some(false)),
    ("e^{i\\pi}", "-1", Some(true)),
    ("(1+i)^2", "2i", Some(true)),
    ("4^n", "2^{2n}", Some(true)),
    ("\\binom{5}{2}", "10", Some(true)),
    ("\\frac{n(n+1)}{2}", "\\binom{n+1}{2}", Some(true)),
    ("\\sum_{k=1}^n k", "\\frac{n(n+1)}2", Some(true)),
    ("\\int_0^1 x^2\\,dx", "\\frac13", Some(true)),
    ("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", "-2", Some(true)),
    ("3", "3x", Some(false)),
    ("\\frac{d}{dx}x^2", "2x", None),
    // Sets, pairs, intervals and matrices.
    ("1,2,3", "3,2,1", Some(true)),
    ("1, 2", "1 and 2", Some(true)),
    ("\\{1,1,2\\}", "\\{1,2\\}", Some(true)),
    ("\\{1,2\\}\\cup\\{3\\}", "\\{1,2,3\\}", Some(true)),
    ("\\pm3", "-3,3", Some(true)),
    ("\\pm3", "3", Some(false)),
    ("(1,2)", "(2,1)", Some(false)),
    ("(1,2)", "1,2", Some(true)),
    ("(1,2)", "\\{2,1\\}", None),
    ("[1,2]", "(1,2)", Some(false)),
    ("(\\frac12,1)", "(0.5,1)", Some(true)),
    ("(2,3),(4,5)", "(4,5),(2,3)", Some(true)),
    ("x>0", "(0,\\infty)", Some(true)),
    ("[3,\\infty)", "x\\ge 3", Some(true)),
    ("1<x<2", "2>x>1", Some(true)),
    ("2x>4", "x>2", Some(true)),
    ("a\\le b", "b\\ge a", Some(true)),
    ("\\infty", "-\\infty", Some(false)),
    ("(-\\infty,1)\\cup(2,\\infty)", "(2,\\infty)\\cup(-\\infty,1)", Some(true)),
    ("2\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\4\\end{pmatrix}", Some(true)),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)", Some(true)),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&5\\end{pmatrix}", Some(false)),
    // Equations and inequalities.
    ("x=5", "5", Some(true)),
    ("x=5", "y=5", Some(false)),
    ("f(x)=2x", "2x", Some(true)),
    ("y=2x+1", "2x-y+1=0", Some(true)),
    ("y=3x", "\\frac yx=3", Some(true)),
    ("2x+4=0", "x=-2", Some(true)),
    ("x^2+y^2=1", "x^2+y^2=2", Some(false)),
    ("12", "3*4=12", Some(true)),
    ("3", "2+2=3", None),
    // Choices and words.
    ("B", "(B)", Some(true)),
    ("B", "B. 12 metres", Some(true)),
    ("A", "C", Some(false)),
    ("\\text{(B)}", "\\textbf{B}", Some(true)),
    ("yes", "Yes.", Some(true)),
    ("yes", "no", Some(false)),
    ("\\text{Evelyn}", "evelyn", Some(true)),
    ("Monday", "on Monday", None),
    ("42", "42, not 43", None),
];

#[test]
fn strict_profile_gives_the_labeled_verdicts() {
    let mut wrong = Vec::new();
    for (gold, answer, expected) in STRICT {
        let found = strict::compare_answers(gold.trim_matches('$'), answer.trim_start_matches('$'));
        if found.equal != *expected {
            wrong.push(format!("{gold} | {answer}: {found:?}, not {expected:?}"));
        }
        // The verdict is symmetric, except for a letter with following text.
        let back = strict::compare_answers(answer.trim_start_matches('$'), gold.trim_matches('$'));
        let choice = answer.contains("12 metres");
        if back.equal != found.equal && !choice {
            wrong.push(format!("{gold} | {answer}: {found:?}, turned round {back:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn ignores_reasoning_and_prefers_the_last_box() {
    assert_eq!(check_completion("7", "<think>\\boxed{7}</think> \\boxed{8}").correct, Some(false));
    assert_eq!(check_completion("7", "<think>x</think>\\boxed{4}, wait: \\boxed{7}").correct, Some(true));
    assert_eq!(
        check_completion("7", "<think>\\boxed{7}").correct,
        None,
        "thinking that never ended has no answer"
    );
    assert_eq!(check_completion("#### 7", "The answer is 7.").correct, Some(true));
}

/// Pair of answers with the verdicts of Math-Verify, in both orders.
#[derive(Debug)]
struct Pair {
    gold: String,
    answer: String,
    equal: bool,
    swapped: bool,
}

/// Returns our own pairs with the verdicts of Math-Verify 0.9.0.
fn pairs() -> Vec<Pair> {
    let text = include_str!("../tests/math_verify.jsonl");
    let read = |line: &str| {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        Pair {
            gold: value["gold"].as_str().unwrap().to_owned(),
            answer: value["answer"].as_str().unwrap().to_owned(),
            equal: value["equal"].as_bool().unwrap(),
            swapped: value["equal_swapped"].as_bool().unwrap(),
        }
    };
    text.lines().map(read).collect()
}

#[test]
fn compat_profile_agrees_with_math_verify() {
    let pairs = pairs();
    let agrees = |gold: &str, answer: &str, equal: bool| compat::is_equal(gold, answer) == equal;
    let wrong: Vec<_> = pairs
        .iter()
        .filter(|pair| {
            !agrees(&pair.gold, &pair.answer, pair.equal) || !agrees(&pair.answer, &pair.gold, pair.swapped)
        })
        .collect();
    let share = 1.0 - wrong.len() as f64 / pairs.len() as f64;
    assert!(share >= 0.98, "{share}: {wrong:#?}");
}

#[test]
fn hostile_input_terminates() {
    let deep = |open: &str, close: &str| format!("{}1{}", open.repeat(10_000), close.repeat(10_000));
    let hostile = [
        deep("{", "}"),
        deep("(", ")"),
        deep("\\frac{", "}{2}"),
        deep("\\sqrt{", "}"),
        // Possible mixed numbers at each level, which would double the work if they nested.
        format!("{}{{4}}", "\\frac{3".repeat(50)),
        format!("{}4{}", "3\\frac{".repeat(60), "}{5}".repeat(60)),
        deep("-", ""),
        "9".repeat(1_000_000),
        "9".repeat(19_000),
        format!("\\frac{{{}}}{{7}}", "3".repeat(9_000)),
        "2^{2^{2^{2^{2^{2}}}}}".to_owned(),
        "10^{10^{10}}".to_owned(),
        "(10^{1000})!".to_owned(),
        "\\sum_{k=1}^{500} \\frac{1}{k^{100}}".to_owned(),
        "\\prod_{k=1}^{10^9} k".to_owned(),
        "\\binom{5000}{2500}".to_owned(),
        "(a+b+c+d+e+f)^{40}".to_owned(),
        "(x+1)^{39}(y+1)^{39}(z+1)^{39}".to_owned(),
        format!("\\{{{}\\}}", (0..1900).map(|n| n.to_string()).collect::<Vec<_>>().join(",")),
        "\\boxed{".repeat(5_000),
        "$1$ and ".repeat(5_000),
        "answer: ".repeat(5_000),
        "1+".repeat(20_000),
        "\\sqrt{1000000007 \\cdot 998244353 \\cdot 1000000009}".to_owned(),
    ];
    for text in &hostile {
        for profile in [Profile::Strict, Profile::Compat] {
            for other in ["7", "x+1", "\\boxed{\\frac12}", text.as_str()] {
                compare_with_profile(other, text, profile);
                compare_with_profile(text, other, profile);
            }
        }
    }
}

/// The cost of these short texts grows exponentially with their nesting depth.
#[test]
fn work_budget_stops_short_but_expensive_answers() {
    let nested = |open: &str, inner: &str, close: &str, levels: usize| {
        format!("{}{inner}{}", open.repeat(levels), close.repeat(levels))
    };
    for (text, decided) in [
        (nested("\\sum_{k=1}^{400}", "k^{1/3}", "", 20), false),
        (nested("\\pm(1+", "1", ")", 20), false),
        ("\\binom{5000}{2500}".repeat(40), false),
        ("\\sum_{k=1}^{400}\\sum_{j=1}^{400}\\ln(170141183460469231731687303715884105727)".to_owned(), false),
        ("\\sum_{k=1}^{400}\\sum_{j=1}^{400}0\\cdot 2000!".to_owned(), false),
        // Texts of their normal forms once grew fourfold with each level.
        (nested("\\sqrt{1+", "x", "}", 20), true),
        (nested("\\sin(1+", "x", ")", 20), true),
    ] {
        let other = text.replacen('x', "2x", 1) + "+1";
        let verdict = strict::compare_answers(&other, &text);
        assert_eq!(verdict.equal.is_some(), decided, "{verdict:?}");
        assert!(decided || verdict.why.contains("more work"), "{verdict:?}");
        compare_with_profile(&format!("${other}$"), &format!("${text}$"), Profile::Compat);
    }
    assert_eq!(
        strict::compare_answers("1/2", "0.5").equal,
        Some(true),
        "the next comparison has its own allowance"
    );
}

prop_compose! {
    /// Two equal formulas in one variable, as LaTeX.
    fn formula()(a in 1i64..9, b in 1i64..9, c in 2u32..4, shape in 0usize..6) -> (String, String) {
        match shape {
            0 => (format!("({a}x+{b})^{c}"), format!("({b}+{a}x)^{{{c}}}")),
            1 => (format!("\\frac{{{a}}}{{x}}+\\frac{{{b}}}{{x+1}}"), format!("\\frac{{{}x+{a}}}{{x^2+x}}", a + b)),
            2 => (format!("\\sqrt{{{}}}", a * a * b), format!("{a}\\sqrt{{{b}}}")),
            3 => (format!("{a}(x+{b})"), format!("{a}x+{}", a * b)),
            4 => (format!("{}^{{x+{b}}}", a + 1), format!("{}^x\\cdot {}^{{{b}}}", a + 1, a + 1)),
            _ => (format!("\\frac{{{a}}}{{{b}}}"), format!("\\frac{{{}}}{{{}}}", a * i64::from(c), b * i64::from(c))),
        }
    }
}

proptest! {
    #[test]
    fn equal_formulas_are_equal_and_their_successors_are_not((a, b) in formula()) {
        for profile in [Profile::Strict, Profile::Compat] {
            let (a, b) = (format!("${a}$"), format!("${b}$"));
            prop_assert_eq!(compare_with_profile(&a, &b, profile).equal, Some(true), "{} {}", a, b);
            let more = format!("{}+1$", b.trim_end_matches('$'));
            prop_assert_eq!(compare_with_profile(&a, &more, profile).equal, Some(false), "{} {}", a, more);
        }
    }

    /// Normal forms and samples never contradict each other.
    #[test]
    fn sampling_agrees_with_the_normal_form((a, _) in formula(), (b, _) in formula()) {
        let read = |text: &str| parser::parse(text, parser::LetterMode::Single).unwrap();
        let (a, b) = (read(&a), read(&b));
        let exact = scalar::compare_values(&a, &b, scalar::Domain::Real);
        let sampled = scalar::compare_at_samples(&a, &b, scalar::Domain::Real);
        let equal = |found| matches!(found, scalar::ValueComparison::Equal | scalar::ValueComparison::EqualAtSamples);
        if sampled != scalar::ValueComparison::Open && exact != scalar::ValueComparison::Open {
            prop_assert_eq!(equal(exact), equal(sampled));
        }
    }

    #[test]
    fn expanded_fractions_are_equal(top in -10_000i64..10_000, bottom in 1i64..500, factor in 1i64..50) {
        let a = format!("{top}/{bottom}");
        let sign = if top < 0 { "-" } else { "" };
        let b = format!("{sign}\\frac{{{}}}{{{}}}", top.abs() * factor, bottom * factor);
        prop_assert_eq!(strict::compare_answers(&a, &b).equal, Some(true));
        prop_assert_eq!(strict::compare_answers(&format!("{}/{bottom}", top + 1), &b).equal, Some(false));
    }

    #[test]
    fn any_text_is_compared_without_panic(a in "[-+0-9a-z.,/%\\\\{}()^_$ =<>|!&]{0,60}", b in "\\PC{0,60}") {
        for (gold, answer) in [(&a, &b), (&b, &a), (&a, &a)] {
            compare_with_profile(gold, answer, Profile::Compat);
            compare_with_profile(gold, answer, Profile::Strict);
        }
    }
}
