//! What begins and ends a step: the actions that stand for the whole of it.

use polystage::schedule::{Action, NAMES, Schedule, generate};

fn parse(text: &str) -> Schedule {
    text.parse().unwrap()
}

#[test]
fn what_is_done_once_a_step_prints_and_parses_without_a_microbatch() {
    for word in ["C", "12R", "3A", "N", "U", "0G"] {
        assert_eq!(word.parse::<Action>().unwrap().to_string(), word);
    }
    for word in ["0C", "C0", "R", "2R0", "R0", "0N", "1U1", "G", "0G0", "c"] {
        let text = word.parse::<Action>().unwrap_err().to_string();
        assert!(
            text.contains("2F0") && text.contains("2R (R, A, G)") && text.contains("(C, N, U)"),
            "{text}"
        );
    }
}

#[test]
fn a_step_is_completed_with_what_begins_and_ends_it() {
    let whole = generate("1f1b", 2, 2).unwrap().completed(&[(1, 0)]).unwrap();
    let text = "# name: 1f1b, stages: 2, microbatches: 2\n\
                C 0F0 0F1 0B0 0B1 0A N U\n\
                C 1F0 1B0 1F1 1B1 0R N U 0G\n";
    assert_eq!(whole.to_string(), text);
    assert_eq!(parse(text), whole);
    // A parameter that two stages of one rank share goes nowhere.
    let together = parse("0F0 1F0 1B0 0B0").completed(&[(1, 0)]).unwrap();
    assert_eq!(together.to_string().lines().nth(1), Some("C 0F0 1F0 1B0 0B0 N U"));
}

#[test]
fn every_recipe_can_be_completed_lowered_and_proved_in_any_order() {
    for name in NAMES {
        let schedule = generate(name, 4, 8).unwrap();
        for ties in [vec![], vec![(schedule.stages - 1, 0)], vec![(3, 0), (0, 3), (2, 1)]] {
            let whole = schedule.completed(&ties).unwrap();
            whole.validate().unwrap();
            assert!(whole.is_complete() && !schedule.is_complete(), "{name}");
            assert_eq!(whole.completed(&ties).unwrap(), whole, "{name}: completing twice changes nothing");
            let [one, other] =
                [whole.lowered().unwrap(), schedule.lowered().unwrap().completed(&ties).unwrap()];
            assert_eq!(one, other, "{name}");
            one.validate().unwrap();
            assert_eq!(one.computation(), schedule, "{name}");
            assert_eq!(one.to_string().parse::<Schedule>().unwrap(), one, "{name}");
        }
    }
}

#[test]
fn a_step_that_is_not_whole_or_in_another_order_is_refused_with_what_is_wrong() {
    for (text, what) in [
        ("C 0F0 0B0 N U\n1F0 1B0", "rank 1 has no C"),
        ("C 0F0 0B0 N\nC 1F0 1B0 N U", "rank 0 has no U"),
        ("0F0 0B0 C N U", "0B0 needs C, which comes later on rank 0"),
        ("C 0F0 N 0B0 U", "N needs 0B0, which comes later on rank 0"),
        ("C 0F0 0B0 U N", "U needs N, which comes later on rank 0"),
        ("C C 0F0 0B0 N U", "C stands twice on rank 0"),
        ("C 0F0 0B0 0A N U\nC 1F0 0R 1B0 N U 0G", "0R needs 1B0, which comes later on rank 1"),
        ("C 0F0 0B0 0A N U\nC 1F0 1B0 0R N U", "0R needs 0G on rank 1"),
        ("C 0F0 0B0 N U\nC 1F0 1B0 N U 0G", "0G needs 0R on rank 1"),
        ("C 0F0 0B0 0A N U\nC 1F0 1B0 0R N 0G U", "0G needs U, which comes later on rank 1"),
        ("C 0F0 0B0 0R N U 0G", "0R moves nothing: stage 0 is on rank 0 alone"),
        ("C 0F0 0B0 N U\nC 1F0 1B0 0R N U 0G", "rank 0 has no 0A, and others send it gradients of stage 0"),
        ("C 0F0 0B0 0A N U\nC 1F0 1B0 N U", "0A adds nothing: nobody sends rank 0 gradients of stage 0"),
        ("C 0F0 0B0 N 0A U\nC 1F0 1B0 0R N U 0G", "N needs 0A, which comes later on rank 0"),
        ("C 0F0 0B0 N U\nC N U", "rank 1 computes nothing"),
        ("C 0F0 0B0 3R N U", "stage 1 is on no rank"),
    ] {
        let error = parse(text).validate().unwrap_err();
        assert!(error.is_input(), "{text}");
        let error = error.to_string();
        assert!(error.contains(what), "{text}: {error}");
    }
}

/// Each rank owns what the other uses: sums before what they need has been sent.
#[test]
fn ranks_that_wait_for_each_others_gradients_are_found_before_anything_runs() {
    let text = "C 0F0 0B0 0A 1R N U 1G\nC 1F0 1B0 1A 0R N U 0G";
    let error = parse(text).validate().unwrap_err().to_string();
    assert!(error.contains("0A needs 1R, which comes later on rank 0"), "{error}");
    parse("C 0F0 0B0 1R 0A N U 1G\nC 1F0 1B0 0R 1A N U 0G").validate().unwrap();
}

#[test]
fn a_whole_step_by_hand_must_send_what_the_model_shares() {
    let without = parse("C 0F0 0B0 N U\nC 1F0 1B0 N U");
    let text = without.completed(&[(1, 0)]).unwrap_err().to_string();
    assert!(text.contains("rank 1 shares parameters of stage 0, so it needs 0R and 0G"), "{text}");
    let with = parse("C 0F0 0B0 0A N U\nC 1F0 1B0 0R N U 0G");
    let text = with.completed(&[]).unwrap_err().to_string();
    assert!(text.contains("rank 1 shares no parameter with stage 0"), "{text}");
    let text = generate("1f1b", 2, 2).unwrap().completed(&[(2, 0)]).unwrap_err().to_string();
    assert!(text.starts_with("ties: stages 2 and 0 are not two of 2"), "{text}");
}
