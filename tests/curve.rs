//! The picture of a run's losses, and the warning of a model that learns its text by heart.

use std::path::Path;

use polystage::train::curve::{Curve, Evaluation, Point, overfitting, warn};
use proptest::prelude::*;

use crate::timeline::assert_well_formed;

/// A run whose loss falls, with an evaluation every `every` steps that is best in the middle.
fn run(steps: u64, every: u64) -> Curve {
    let mut curve = Curve::default();
    for step in 1..=steps {
        let part = step as f64 / steps as f64;
        let wave = 0.2 * ((step * 2_654_435_761 % 1000) as f64 / 1000.0 - 0.5);
        let is_evaluated = step % every == 0 || step == steps;
        curve.push(Point {
            step,
            loss: Some(1.2 + 4.3 * (-5.0 * part).exp() + wave),
            valid_loss: is_evaluated.then(|| 1.6 + 4.0 * (-6.0 * part).exp() + 0.5 * part * part),
            learning_rate: Some(1e-3 * (part * 20.0).min(1.0) * (1.0 - 0.9 * part)),
        });
    }
    curve
}

#[test]
fn the_picture_shows_what_a_run_has_and_names_nothing_else() {
    let svg = run(300, 25).to_svg("Losses up to step 300", &[100, 200, 250, 300]);
    assert_well_formed(&svg);
    for words in [
        "Losses up to step 300",
        "loss of a step",
        "smoothed",
        ">evaluation<",
        "best evaluation",
        "checkpoint<",
        "learning rate",
        "checkpoint of step 250",
        ">step<",
    ] {
        assert!(svg.contains(words), "{words}: {svg}");
    }
    let one = Point { step: 1, loss: Some(5.5), learning_rate: Some(1e-4), valid_loss: None };
    let mut curve = Curve::default();
    curve.push(one);
    let svg = curve.to_svg("one", &[]);
    assert_well_formed(&svg);
    assert!(svg.contains("training 5.5") && svg.contains("learning rate"), "{svg}");
    for words in ["smoothed", "evaluation", "checkpoint"] {
        assert!(!svg.contains(words), "{words}: {svg}");
    }
    let svg = Curve::default().to_svg("nothing", &[1, 2]);
    assert_well_formed(&svg);
    assert!(svg.contains("no step yet"), "{svg}");
}

#[test]
fn the_picture_of_a_very_long_run_is_small_and_shows_its_highest_loss() {
    let mut curve = run(100_000, 10);
    curve.push(Point { step: 100_001, loss: Some(9.75), ..Point::default() });
    let svg = curve.to_svg("long", &(1..=100_001).collect::<Vec<_>>());
    assert_well_formed(&svg);
    assert!(svg.len() < 100_000, "{} bytes", svg.len());
    let usual = run(100_000, 10).to_svg("long", &[]);
    // The axis makes room for it.
    assert!(svg.contains(">8<") && !usual.contains(">8<"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_picture_of_any_numbers_is_well_formed(
        rows in prop::collection::vec(
            (
                prop_oneof![0u64..500, any::<u64>()],
                prop::option::of(prop_oneof![0.0..10.0f64, any::<f64>(), Just(f64::MAX), Just(f64::NAN)]),
                prop::option::of(prop_oneof![0.0..10.0f64, any::<f64>(), Just(f64::INFINITY)]),
                prop::option::of(any::<f64>()),
            ),
            0..40,
        ),
        checkpoints in prop::collection::vec(any::<u64>(), 0..5),
    ) {
        let mut curve = Curve::default();
        for (step, loss, valid_loss, learning_rate) in rows {
            curve.push(Point { step, loss, valid_loss, learning_rate });
        }
        assert_well_formed(&curve.to_svg("any <&>", &checkpoints));
        overfitting(curve.evaluations());
    }
}

/// Evaluations every ten steps with these losses, and those of training since the one before.
fn evaluations(losses: &[(f64, f64)]) -> Vec<Evaluation> {
    let all = losses.iter().zip(1..);
    all.map(|(&(loss, training), n)| Evaluation { step: 10 * n, loss, training }).collect()
}

#[test]
fn three_rises_in_a_row_are_told_once_until_the_loss_falls_again() {
    let told = |losses: &[(f64, f64)]| {
        let all = evaluations(losses);
        let at = (1..=all.len()).filter(|&n| overfitting(&all[..n]).is_some());
        at.map(|n| 10 * n as u64).collect::<Vec<_>>()
    };
    let rising = [(2.0, 2.0), (1.5, 1.5), (1.6, 1.4), (1.7, 1.3), (1.8, 1.2)];
    assert_eq!(told(&rising), [50]);
    assert_eq!(told(&[&rising[..], &[(1.9, 1.1), (2.0, 1.0)]].concat()), [50], "once");
    let twice = [&rising[..], &[(1.75, 1.1), (1.8, 1.0), (1.9, 0.9), (2.0, 0.8), (2.1, 0.7)]].concat();
    assert_eq!(told(&twice), [50, 90], "again after it fell");
    assert_eq!(told(&[(1.5, 1.5), (1.6, 1.4), (1.7, 1.3)]), [0; 0], "two rises");
    assert_eq!(told(&[(1.5, 1.5), (1.6, 1.4), (1.6, 1.3), (1.7, 1.2)]), [0; 0], "one was no rise");
    assert_eq!(
        told(&[(1.5, 1.5), (1.6, 1.6), (1.7, 1.7), (1.8, 1.8)]),
        [0; 0],
        "training does not fall either"
    );
    let late = [(1.5, 1.5), (1.6, 1.6), (1.7, 1.7), (1.8, 1.8), (1.9, 1.4), (2.0, 1.3)];
    assert_eq!(told(&late), [50], "as soon as training has fallen");
    assert_eq!(told(&[(1.5, f64::NAN), (f64::NAN, 1.5), (1.7, 1.3), (f64::INFINITY, 1.2)]), [0; 0]);
    let all = evaluations(&rising);
    let text = warn(overfitting(&all).unwrap(), Path::new("runs/x/checkpoints/000020"), false);
    for words in
        ["from step 20 to 50", "3 times", "1.5000 to 1.8000", "runs/x/checkpoints/000020", "train.patience"]
    {
        assert!(text.contains(words), "{text}");
    }
    assert!(!text.contains('\n') && !warn(&all, Path::new("x"), true).contains("patience"), "{text}");
}

#[test]
fn the_loss_of_training_beside_an_evaluation_is_that_of_the_steps_before_it() {
    let mut curve = Curve::default();
    for (step, loss, valid_loss) in [(1, 4.0, None), (2, 2.0, Some(2.5)), (3, 1.0, Some(2.0)), (4, 0.5, None)]
    {
        curve.push(Point { step, loss: Some(loss), valid_loss, learning_rate: None });
    }
    let wanted =
        [Evaluation { step: 2, loss: 2.5, training: 3.0 }, Evaluation { step: 3, loss: 2.0, training: 1.0 }];
    assert_eq!(curve.evaluations(), wanted);
    assert_eq!(curve.best(), Some(wanted[1]));
}
