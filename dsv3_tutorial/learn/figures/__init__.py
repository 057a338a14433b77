"""One module per lesson: functions from numbers to a figure, all in the look of `style`."""
