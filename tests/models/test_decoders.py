import torch

from gcssl.models.decoders import MapDecoder, TokenDecoder, sincos_positions


def test_positions_by_hand() -> None:
    p = sincos_positions(2, 3, 8)  # frequencies 1 and 1/100
    assert p.shape == (6, 8)
    row, col = 1.0, 2.0
    want = torch.tensor([col, col / 100, col, col / 100, row, row / 100, row, row / 100])
    torch.testing.assert_close(p[5], torch.cat([want[:2].sin(), want[2:4].cos(), want[4:6].sin(), want[6:].cos()]))
    assert torch.equal(p[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))


def test_each_kept_token_lands_in_its_own_cell() -> None:
    """One encoder token of 2 x 2 kept units on a grid of 4 x 4, without blocks, norm and positions."""
    decoder = TokenDecoder(4, (4, 4), upscale=1, split=2, dim=32, depth=1)
    decoder.blocks, decoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    with torch.no_grad():
        decoder.positions.zero_()
        decoder.mask_token.fill_(-1.0)
        decoder.pred.weight.copy_(torch.eye(3, 32))
        decoder.embed.weight.zero_()
        decoder.embed.bias.copy_(
            torch.arange(4.0).repeat(32)
        )  # channel c's value in row i, column j of a token: 2i + j
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[0, 1, 0] = mask[0, 0, 3] = mask[0, 2, 1] = mask[0, 3, 3] = False
    got = decoder(torch.zeros(1, 4, 1, 1), mask)
    want = torch.tensor([[-1, -1, -1, 1], [0, -1, -1, -1], [-1, 2, -1, -1], [-1, -1, -1, 3.0]])
    assert torch.equal(got, want.expand(1, 3, 4, 4))


def test_pixels_of_a_cell_are_in_order() -> None:
    decoder = TokenDecoder(4, (2, 3), upscale=8, split=1, dim=32, depth=1)
    with torch.no_grad():
        decoder.pred.weight.zero_()
        decoder.pred.bias.copy_(torch.arange(3 * 64.0))
    y = decoder(torch.randn(1, 4, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool))
    c, i, j = torch.meshgrid(torch.arange(3), torch.arange(16), torch.arange(24), indexing="ij")
    assert torch.equal(y[0], (c * 64 + i % 8 * 8 + j % 8).float())


def test_hidden_cells_start_as_the_mask_token_and_know_their_place() -> None:
    torch.manual_seed(0)
    decoder = TokenDecoder(4, (2, 2), upscale=4, split=1, dim=32, depth=2)
    mask = torch.tensor([[[True, True], [True, False]]])
    x = torch.randn(1, 4, 2, 2)
    with torch.no_grad():
        y = decoder(x, mask)
        other = x.clone()
        other[..., 0, :] = 100.0
        other[..., 1, 0] = float("inf")
        assert torch.equal(decoder(other, mask), y)
        assert not torch.equal(y[..., :4, :4], y[..., :4, 4:])
        other[..., 1, 1] += 1.0
        assert not torch.equal(decoder(other, mask), y)
    assert "positions" not in decoder.state_dict()


def test_the_map_decoder_equals_a_slow_version() -> None:
    """Pre-norm blocks, heads of 32, GELU; token by token and head by head."""
    torch.manual_seed(1)
    decoder = MapDecoder(5, dim=64, depth=2).double()
    for parameter in decoder.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64)
    got = decoder(x)
    assert got.shape == (2, 64, 2, 3)
    for i in range(2):
        tokens = decoder.embed(torch.stack([x[i, :, r, c] for r in range(2) for c in range(3)]))  # 6 64
        for block in decoder.blocks:
            q, k, v = (part.view(6, 2, 32) for part in block.attn.qkv(block.norm1(tokens)).split(64, -1))
            mixed = torch.empty(6, 2, 32, dtype=torch.float64)
            for t in range(6):
                for head in range(2):
                    weight = torch.stack([q[t, head] @ k[u, head] for u in range(6)]).div(32**0.5).softmax(0)
                    mixed[t, head] = sum(weight[u] * v[u, head] for u in range(6))
            tokens = tokens + block.attn.proj(mixed.flatten(1))
            tokens = tokens + block.mlp.fc2(torch.nn.functional.gelu(block.mlp.fc1(block.norm2(tokens))))
        tokens = torch.nn.functional.layer_norm(tokens, (64,), decoder.norm.weight, decoder.norm.bias, 1e-5)
        torch.testing.assert_close(got[i].flatten(1).T, tokens)


def test_linears_start_as_published() -> None:
    for decoder in (MapDecoder(8, 32, 2), TokenDecoder(8, (4, 4), upscale=32, split=1, dim=32, depth=2)):
        linears = [m for m in decoder.modules() if isinstance(m, torch.nn.Linear)]
        assert len(linears) >= 8
        for linear in linears:  # Glorot and Bengio's uniform: sqrt(6 / (in + out)), whose deviation is bound / sqrt(3)
            bound = (6 / sum(linear.weight.shape)) ** 0.5
            assert linear.weight.abs().max() <= bound and not linear.bias.any()
            assert abs(linear.weight.std() * 3**0.5 / bound - 1) < 0.1
