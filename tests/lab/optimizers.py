"""An optimizer of one's own: any function of a learning rate that returns an optax transformation."""

import optax


def sign_descent(learning_rate, decay=0.9):
    return optax.chain(optax.trace(decay), optax.scale_by_sign(), optax.scale_by_learning_rate(learning_rate))
