"""The paper's equations once more, for the tests: Python floats and one loop per index, nothing of the package.

Tensors come in, are read out as nested lists, and go back into a float64 tensor at the end.
"""
import math

import torch


def _dot(a, b):
    return math.fsum(p * q for p, q in zip(a, b, strict=True))


def _project(weight, vector):
    """A 1x1 convolution of a pooled vector: one dot product per output channel."""
    return [_dot(row, vector) for row in weight.tolist()]


def _sigmoid(v):
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def cme_gate(x, w1, w2, w3, b3=None):
    """Equations (2)-(6): clip (B, T, C, H, W) to gates (B, T, C)."""
    _B, T, C, H, W = x.shape
    gates = []
    for clip in x.tolist():
        pooled = [
            [math.fsum(clip[t][c][h][w] for h in range(H) for w in range(W)) / (H * W) for c in range(C)]
            for t in range(T)]
        z = [_project(w1, pooled[t]) for t in range(T)]                                         # (2)
        k = [_project(w2, pooled[t]) for t in range(T)]                                         # (3)
        a = []
        for t in range(T):
            d = [-_dot(k[t], k[j]) for j in range(T)]                                           # (4)
            e = [math.exp(d[j] - max(d)) for j in range(T)]
            d_hat = [e[j] / math.fsum(e) for j in range(T)]                                     # sums to 1 over j
            z_hat = [
                z[t][i] + math.fsum(d_hat[j] * z[j][i] for j in range(T)) for i in range(len(z[t]))]    # (5)
            logits = _project(w3, z_hat)
            a.append([_sigmoid(logits[c] + (0. if b3 is None else b3[c].item())) for c in range(C)])    # (6)
        gates.append(a)
    return torch.tensor(gates, dtype=torch.float64)


def cme(x, w1, w2, w3, b3=None):
    """Equation (1): u_t = x_t * a_t."""
    B, T, C, H, W = x.shape
    a, x = cme_gate(x, w1, w2, w3, b3).tolist(), x.tolist()
    return torch.tensor([[[[[
        x[b][t][c][h][w] * a[b][t][c]
        for w in range(W)] for h in range(H)] for c in range(C)] for t in range(T)] for b in range(B)],
        dtype=torch.float64)


def similarity(x):
    """Equation (7), with s_T = s_{T-1}, 0 where a vector is zero, and 1 for a still: (B, T, H, W)."""
    B, T, C, H, W = x.shape
    x = x.tolist()
    s = []
    for b in range(B):
        maps = []
        for t in range(max(T - 1, 1)):
            rows = []
            for h in range(H):
                row = []
                for w in range(W):
                    if T == 1:
                        row.append(1.)
                        continue
                    p = [x[b][t][c][h][w] for c in range(C)]
                    q = [x[b][t + 1][c][h][w] for c in range(C)]
                    norms = math.sqrt(_dot(p, p)) * math.sqrt(_dot(q, q))
                    row.append(_dot(p, q) / norms if norms else 0.)
                rows.append(row)
            maps.append(rows)
        if T > 1:
            maps.append(maps[-1])
        s.append(maps)
    return torch.tensor(s, dtype=torch.float64)


def motion(x):
    """The inner term of equation (8): x_t o (1 - s_t)."""
    B, T, C, H, W = x.shape
    s, x = similarity(x).tolist(), x.tolist()
    return torch.tensor([[[[[
        x[b][t][c][h][w] * (1 - s[b][t][h][w])
        for w in range(W)] for h in range(H)] for c in range(C)] for t in range(T)] for b in range(B)],
        dtype=torch.float64)


def sme(x, conv, conv_bias, bn_weight, bn_bias, bn_mean, bn_var, eps):
    """Equation (8) in eval mode: BN(Conv(x_t o (1 - s_t))) + x_t."""
    B, T, C, H, W = x.shape
    m, x, conv = motion(x).tolist(), x.tolist(), conv.tolist()

    def term(b, t, o, h, w):
        y = math.fsum(conv[o][c][0][0] * m[b][t][c][h][w] for c in range(C))
        y += 0. if conv_bias is None else conv_bias[o].item()
        return (y - bn_mean[o].item()) / math.sqrt(bn_var[o].item() + eps) * bn_weight[o].item() + bn_bias[o].item()

    return torch.tensor([[[[[
        term(b, t, c, h, w) + x[b][t][c][h][w]
        for w in range(W)] for h in range(H)] for c in range(C)] for t in range(T)] for b in range(B)],
        dtype=torch.float64)


def tim(x, weight):
    """TEINet's temporal interaction: tap i of K reads frame t + i - K // 2; frames beyond the clip are zero."""
    B, T, C, H, W = x.shape
    K, x, weight = weight.shape[2], x.tolist(), weight.tolist()

    def tap(b, t, c, h, w, i):
        source = t + i - K // 2
        return weight[c][0][i] * x[b][source][c][h][w] if 0 <= source < T else 0.

    return torch.tensor([[[[[
        math.fsum(tap(b, t, c, h, w, i) for i in range(K))
        for w in range(W)] for h in range(H)] for c in range(C)] for t in range(T)] for b in range(B)],
        dtype=torch.float64)
